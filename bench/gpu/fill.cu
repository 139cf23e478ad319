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

__global__ void scale_rows_kernel(BFloat16* data, std::int64_t rows, std::int64_t width,
                                  std::uint64_t seed, float spread) {
  for (std::int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const float u =
        static_cast<float>(hash(hash(seed) ^ static_cast<std::uint64_t>(r)) >> 40) * 0x1p-24f;
    const float factor = exp2f(spread * (2.0f * u - 1.0f));
    for (std::int64_t d = threadIdx.x; d < width; d += blockDim.x) {
      BFloat16* p = data + r * width + d;
      store(p, factor * __uint_as_float(static_cast<unsigned>(p->bits) << 16));
    }
  }
}

__global__ void mismatch_kernel(const std::uint8_t* a, const std::uint8_t* b, std::int64_t count,
                                unsigned long long* mismatches) {
  unsigned long long mine = 0;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    mine += a[i] != b[i];
  }
  if (mine != 0) atomicAdd(mismatches, mine);
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

void scale_rows(BFloat16* data, std::int64_t rows, std::int64_t width, std::uint64_t seed,
                cudaStream_t stream, float spread) {
  if (rows == 0) return;
  scale_rows_kernel<<<132 * 8, 128, 0, stream>>>(data, rows, width, seed, spread);
  SNAPMLA_CUDA_CHECK(cudaGetLastError());
}

std::int64_t count_mismatches(const std::uint8_t* a, const std::uint8_t* b, std::int64_t count,
                              cudaStream_t stream) {
  if (count == 0) return 0;
  DeviceBuffer<unsigned long long> mismatches(1);
  mismatches.fill_bytes(0);
  SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
  mismatch_kernel<<<132 * 4, 256, 0, stream>>>(a, b, count, mismatches.data());
  SNAPMLA_CUDA_CHECK(cudaGetLastError());
  SNAPMLA_CUDA_CHECK(cudaStreamSynchronize(stream));
  return static_cast<std::int64_t>(mismatches.download()[0]);
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
