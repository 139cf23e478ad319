#include "fill.h"

#include <cuda_bf16.h>

#include <numeric>

#include "device.h"

namespace snapmla::gpu {
namespace {

__device__ std::uint64_t hash(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Box-Muller on the hash of the element's number: no state, any order of execution.
__device__ float normal(std::uint64_t seed, std::uint64_t i) {
  const std::uint64_t h = hash(hash(seed) ^ i);
  const float u = (static_cast<float>(h >> 40) + 0.5f) * 0x1p-24f;
  const float v = static_cast<float>(h & 0xffffff) * 0x1p-24f;
  return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

__device__ void store(float* p, float x) { *p = x; }
__device__ void store(BFloat16* p, float x) {
  *p = BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

template <class T>
__global__ void normal_kernel(T* data, std::int64_t count, std::uint64_t seed, float deviation,
                              float mean) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    store(data + i, mean + deviation * normal(seed, static_cast<std::uint64_t>(i)));
  }
}

template <class T>
void launch_normal(T* data, std::int64_t count, std::uint64_t seed, cudaStream_t stream,
                   float deviation, float mean) {
  if (count == 0) return;
  normal_kernel<<<132 * 8, 256, 0, stream>>>(data, count, seed, deviation, mean);
  SNAPMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void fill_normal(BFloat16* data, std::int64_t count, std::uint64_t seed, cudaStream_t stream,
                 float deviation, float mean) {
  launch_normal(data, count, seed, stream, deviation, mean);
}

void fill_normal(float* data, std::int64_t count, std::uint64_t seed, cudaStream_t stream,
                 float deviation, float mean) {
  launch_normal(data, count, seed, stream, deviation, mean);
}

std::vector<std::int32_t> shuffled(std::int64_t count, std::uint64_t seed) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[static_cast<std::size_t>(mix(seed) % i)]);
  }
  return order;
}

}  // namespace snapmla::gpu
