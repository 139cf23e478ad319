// model.safetensors.index.json of a stranger, beside two sound shards: a checkpoint whose tensors
// can be read, or an Error.
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "model/safetensors.h"
#include "snapmla/error.h"

namespace {

void write(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

std::string shard(const std::string& first, const std::string& second) {
  std::string header = "{\"" + first + R"(":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},")" +
                       second + R"(":{"dtype":"BF16","shape":[2,2],"data_offsets":[8,16]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + std::string(16, 'x');
}

const std::filesystem::path& directory() {
  static const std::filesystem::path dir = [] {
    const std::filesystem::path memory = "/dev/shm";  // quicker than a disk
    const std::filesystem::path parent =
        std::filesystem::exists(memory) ? memory : std::filesystem::temp_directory_path();
    std::string name = (parent / "snapmla_fuzz_XXXXXX").string();
    if (!mkdtemp(name.data())) std::abort();
    write(std::filesystem::path(name) / "a.safetensors", shard("w", "x"));
    write(std::filesystem::path(name) / "b.safetensors", shard("y", "z"));
    std::atexit([] { std::filesystem::remove_all(directory()); });
    return std::filesystem::path(name);
  }();
  return dir;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  write(directory() / "model.safetensors.index.json", {reinterpret_cast<const char*>(data), size});
  try {
    const snapmla::model::Checkpoint checkpoint = snapmla::model::Checkpoint::open(directory());
    unsigned sum = 0;
    for (const auto& [name, view] : checkpoint.tensors()) {
      const auto bytes = static_cast<std::size_t>(view.numel()) * snapmla::size_of(view.dtype());
      if (bytes != 8) std::abort();
      for (std::size_t i = 0; i < bytes; ++i) sum += view.data<const std::uint8_t>()[i];
    }
    volatile unsigned sink = sum;
    (void)sink;
  } catch (const snapmla::Error&) {
  }
  return 0;
}
