#include "tensor/memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "base/check.h"

namespace snapmla {
namespace {

constexpr std::int64_t kAlignment = 256;
constexpr std::int64_t kMapFrom = std::int64_t{4} << 20;  // smaller blocks come from the heap

std::size_t padded(std::int64_t bytes) {
  return static_cast<std::size_t>((bytes + kAlignment - 1) / kAlignment * kAlignment);
}

class HostMemory final : public Memory {
 public:
  bool host_accessible() const override { return true; }

  void* allocate(std::int64_t bytes) override {
    require(bytes >= 0, "bytes", bytes, "at least 0");
    if (bytes < kMapFrom) {
      void* data = std::aligned_alloc(kAlignment, padded(bytes > 0 ? bytes : 1));
      if (!data) fail(bytes);
      return data;
    }
    void* data = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) fail(bytes);
    return data;
  }

  void release(void* data, std::int64_t bytes) noexcept override {
    if (bytes < kMapFrom) {
      std::free(data);
    } else {
      munmap(data, static_cast<std::size_t>(bytes));
    }
  }

  void upload(void* to, const void* from, std::int64_t bytes) override { copy(to, from, bytes); }
  void download(void* to, const void* from, std::int64_t bytes) override { copy(to, from, bytes); }
  void copy(void* to, const void* from, std::int64_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
  void clear(void* to, std::int64_t bytes) override {
    if (bytes > 0) std::memset(to, 0, static_cast<std::size_t>(bytes));
  }

 private:
  [[noreturn]] static void fail(std::int64_t bytes) {
    throw Error(ErrorCode::kOutOfMemory,
                str("cannot reserve ", bytes, " bytes of host memory: ", std::strerror(errno)));
  }
};

}  // namespace

Memory& host_memory() {
  static HostMemory memory;
  return memory;
}

}  // namespace snapmla
