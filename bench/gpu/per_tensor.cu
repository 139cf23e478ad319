#include <cuda_fp8.h>

#include <algorithm>
#include <cstring>

#include "per_tensor.h"

namespace snapmla::gpu {
namespace {

__device__ float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__global__ void amax_kernel(const BFloat16* data, std::int64_t count, unsigned* amax_bits) {
  float mine = 0;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    mine = fmaxf(mine, fabsf(widen(data[i])));
  }
  atomicMax(amax_bits, __float_as_uint(mine));  // non-negative floats order like their bits
}

__global__ void code_kernel(const BFloat16* data, std::int64_t count, float scale,
                            std::uint8_t* codes) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    codes[i] = __nv_cvt_float_to_fp8(widen(data[i]) / scale, __NV_SATFINITE, __NV_E4M3);
  }
}

}  // namespace

PerTensorCodes quantize_per_tensor(const BFloat16* latent, const BFloat16* rope, std::int64_t rows,
                                   cudaStream_t stream) {
  PerTensorCodes result;
  result.latent = DeviceBuffer<std::uint8_t>(rows * 512);
  result.rope = DeviceBuffer<std::uint8_t>(rows * 64);
  DeviceBuffer<unsigned> amax(1);
  amax.fill_bytes(0);
  SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
  amax_kernel<<<1056, 256, 0, stream>>>(latent, rows * 512, amax.data());
  amax_kernel<<<1056, 256, 0, stream>>>(rope, rows * 64, amax.data());
  SNAPMLA_CUDA_CHECK(cudaGetLastError());
  SNAPMLA_CUDA_CHECK(cudaStreamSynchronize(stream));
  float largest = 0;
  std::memcpy(&largest, amax.download().data(), 4);
  result.scale = largest > 0 ? largest / 448.0f : 1.0f;
  code_kernel<<<1056, 256, 0, stream>>>(latent, rows * 512, result.scale, result.latent.data());
  code_kernel<<<1056, 256, 0, stream>>>(rope, rows * 64, result.scale, result.rope.data());
  SNAPMLA_CUDA_CHECK(cudaGetLastError());
  SNAPMLA_CUDA_CHECK(cudaStreamSynchronize(stream));
  return result;
}

}  // namespace snapmla::gpu
