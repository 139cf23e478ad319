// Which device this is and whether the kernels run on it; errors of the runtime.
#include <array>
#include <atomic>
#include <limits>
#include <string>

#include "backends/cuda/launch.h"
#include "base/check.h"

namespace snapmla::cuda {
namespace {

std::string find_reason() {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return str("no usable CUDA device: ", cudaGetErrorString(status));
  }
  if (count == 0) return "no CUDA device was found";
  int device = 0, major = 0, minor = 0;
  status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return str("the current CUDA device cannot be queried: ", cudaGetErrorString(status));
  }
  if (major != 9 || minor != 0) {
    return str("CUDA device ", device, " has compute capability ", major, ".", minor,
               ", the kernels need 9.0 (Hopper)");
  }
  return "";
}

}  // namespace

const char* unavailable_reason() noexcept {
  thread_local std::string reason;
  try {
    reason = find_reason();
  } catch (...) {
    return "the CUDA devices cannot be queried";
  }
  return reason.c_str();
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the launch's error must not be taken for a later one's
  const ErrorCode code =
      status == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kInternal;
  throw Error(code, str("cuda ", what, ": ", cudaGetErrorString(status)));
}

void require_device() {
  // A device that was found usable stays so; asking the driver on each launch would cost more than
  // the launch.
  static std::array<std::atomic<bool>, 64> known{};
  int device = -1;
  if (cudaGetDevice(&device) == cudaSuccess && device >= 0 &&
      device < static_cast<int>(known.size()) &&
      known[static_cast<std::size_t>(device)].load(std::memory_order_relaxed)) {
    return;
  }
  const char* reason = unavailable_reason();
  if (*reason) throw Error(ErrorCode::kUnsupported, str("backend cuda: ", reason));
  if (device >= 0 && device < static_cast<int>(known.size()))
    known[static_cast<std::size_t>(device)].store(true, std::memory_order_relaxed);
}

unsigned blocks_for(const char* what, std::int64_t items, std::int64_t per_block) {
  const std::int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks > std::numeric_limits<std::int32_t>::max())
    throw Error(ErrorCode::kInvalidArgument,
                str(what, ": got ", items, " rows, accepted are at most ",
                    per_block * std::numeric_limits<std::int32_t>::max()));
  return static_cast<unsigned>(blocks);
}

}  // namespace snapmla::cuda
