// A safetensors file of a stranger: views inside the file or an Error, nothing else.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "model/safetensors.h"
#include "snapmla/error.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const int fd = memfd_create("fuzz", MFD_CLOEXEC);
  static const std::string path = "/proc/self/fd/" + std::to_string(fd);
  if (fd < 0 || ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != static_cast<ssize_t>(size)) {
    std::abort();
  }
  try {
    const snapmla::model::SafetensorsFile file(path);
    unsigned sum = 0;
    for (const auto& [name, view] : file.tensors()) {
      const auto bytes = static_cast<std::size_t>(view.numel()) * snapmla::size_of(view.dtype());
      if (bytes > size) std::abort();
      const auto* first = view.data<const std::uint8_t>();
      for (std::size_t i = 0; i < bytes; ++i) sum += first[i];
    }
    volatile unsigned sink = sum;
    (void)sink;
  } catch (const snapmla::Error&) {
  }
  return 0;
}
