#include "backends/cuda/device_memory.h"

#include "backends/cuda/launch.h"
#include "base/check.h"

namespace snapmla::cuda {
namespace {

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }
std::size_t size(std::int64_t bytes) { return static_cast<std::size_t>(bytes); }

}  // namespace

void* DeviceMemory::allocate(std::int64_t bytes) {
  require(bytes >= 0, "bytes", bytes, "at least 0");
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, size(bytes > 0 ? bytes : 1));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    std::size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw Error(ErrorCode::kOutOfMemory, str("cannot allocate ", bytes, " bytes of device memory: ",
                                             free, " of ", total, " bytes are free"));
  }
  check(status, "cudaMalloc");
  return data;
}

void DeviceMemory::release(void* data, std::int64_t) noexcept {
  // cudaFree waits for the device, so that no kernel is using the memory.
  if (cudaFree(data) != cudaSuccess) cudaGetLastError();
}

void DeviceMemory::upload(void* to, const void* from, std::int64_t bytes) {
  // From pageable memory the call returns once the bytes have been staged; from pinned memory it
  // would not, so the stream is waited for.
  check(cudaMemcpyAsync(to, from, size(bytes), cudaMemcpyHostToDevice, native(stream_)), "upload");
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, from) != cudaSuccess) {
    cudaGetLastError();
  } else if (attributes.type != cudaMemoryTypeUnregistered) {
    check(cudaStreamSynchronize(native(stream_)), "upload");
  }
}

void DeviceMemory::download(void* to, const void* from, std::int64_t bytes) {
  check(cudaMemcpyAsync(to, from, size(bytes), cudaMemcpyDeviceToHost, native(stream_)),
        "download");
  check(cudaStreamSynchronize(native(stream_)), "download");
}

void DeviceMemory::copy(void* to, const void* from, std::int64_t bytes) {
  check(cudaMemcpyAsync(to, from, size(bytes), cudaMemcpyDeviceToDevice, native(stream_)), "copy");
}

void DeviceMemory::clear(void* to, std::int64_t bytes) {
  check(cudaMemsetAsync(to, 0, size(bytes), native(stream_)), "clear");
}

}  // namespace snapmla::cuda
