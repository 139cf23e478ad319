// The one order of a dot product: lane l of a warp adds elements 128 i + 4 l .. + 3 for i = 0, 1,
// ..., then the lanes are added in a butterfly (16, 8, 4, 2, 1). Every matrix product of the
// backend uses it, so a row's bits depend neither on how many rows are in the call nor on the
// kernel that was chosen for that number. Element 128 i of an FP8 row begins a block with a scale
// of its own.
#pragma once

#include <cuda_fp16.h>

#include "backends/cuda/kv_cache/lane.h"
#include "backends/cuda/model/model_ops.h"

namespace snapmla::cuda {

inline constexpr int kDotStep = 4 * kLanes;  // elements per warp and step

__device__ __forceinline__ float warp_sum(float v) {
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
  for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, mask));
  return v;
}

__device__ __forceinline__ void decode_four(std::uint32_t codes, float* to) {
  for (int half = 0; half < 2; ++half) {
    std::uint32_t pair;  // two f16, which hold every e4m3 value
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;"
        : "=r"(pair)
        : "h"(static_cast<std::uint16_t>(codes >> (16 * half))));
    const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    to[2 * half] = values.x;
    to[2 * half + 1] = values.y;
  }
}

// Elements k .. k + 3 of a row of `width` elements; those past its end are 0. vector: the row is
// aligned to four elements and width is a multiple of four.
__device__ __forceinline__ void load_four(const float* row, std::int64_t k, std::int64_t width,
                                          bool vector, float* to) {
  if (vector) {
    const float4 v = *reinterpret_cast<const float4*>(row + k);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    for (int c = 0; c < 4; ++c) to[c] = k + c < width ? row[k + c] : 0.0f;
  }
}
__device__ __forceinline__ void load_four(const BFloat16* row, std::int64_t k, std::int64_t width,
                                          bool vector, float* to) {
  if (vector) {
    const uint2 v = *reinterpret_cast<const uint2*>(row + k);
    to[0] = numeric::low_bf16(v.x), to[1] = numeric::high_bf16(v.x);
    to[2] = numeric::low_bf16(v.y), to[3] = numeric::high_bf16(v.y);
  } else {
    for (int c = 0; c < 4; ++c) to[c] = k + c < width ? numeric::bf16_to_float(row[k + c]) : 0.0f;
  }
}
__device__ __forceinline__ void load_four(const Float8E4M3* row, std::int64_t k, std::int64_t width,
                                          bool vector, float* to) {
  std::uint32_t codes = 0;
  if (vector) {
    codes = *reinterpret_cast<const std::uint32_t*>(row + k);
  } else {
    for (int c = 0; c < 4; ++c) {
      if (k + c < width) codes |= static_cast<std::uint32_t>(row[k + c].bits) << (8 * c);
    }
  }
  decode_four(codes, to);
}

// Elements k .. k + 3 of row n of a weight, dequantised.
template <class T>
__device__ __forceinline__ void load_weight(const DeviceWeight& w, std::int64_t n, std::int64_t k,
                                            std::int64_t width, bool vector, float* to) {
  load_four(static_cast<const T*>(w.data) + n * w.stride, k, width, vector, to);
  if constexpr (sizeof(T) == 1) {
    const float scale = w.scale_inv[n / 128 * w.scale_stride + k / 128];
    for (int c = 0; c < 4; ++c) to[c] *= scale;
  }
}

__device__ __forceinline__ float add_products(const float* a, const float* b, float sum) {
  for (int c = 0; c < 4; ++c) sum = fmaf(a[c], b[c], sum);
  return sum;
}

// Row n of a weight times x, in every lane.
template <class T>
__device__ __forceinline__ float dot(const DeviceWeight& w, std::int64_t n, const float* x,
                                     std::int64_t width, bool vector, int lane) {
  float sum = 0;
  for (std::int64_t k = 4 * lane; k < width; k += kDotStep) {
    float a[4], b[4];
    load_weight<T>(w, n, k, width, vector, a);
    load_four(x, k, width, vector, b);
    sum = add_products(a, b, sum);
  }
  return warp_sum(sum);
}

inline DeviceWeight device_weight(const ops::Weight& w) {
  return DeviceWeight{w.data.raw(), w.scale_inv.data<const float>(), w.data.stride(0),
                      w.scale_inv.raw() ? w.scale_inv.stride(0) : 0};
}

// Whether every row of a tensor can be read four elements at a time.
inline bool rows_in_fours(const TensorView& t) {
  const auto size = static_cast<std::int64_t>(size_of(t.dtype()));
  bool ok = t.dim(-1) % 4 == 0 &&
            reinterpret_cast<std::uintptr_t>(t.raw()) % (4 * size_of(t.dtype())) == 0;
  for (int d = 0; d < t.rank() - 1; ++d) ok = ok && t.stride(d) * size % (4 * size) == 0;
  return ok;
}

// Calls fn with a value of the weight's storage type.
template <class Fn>
void dispatch_weight(DType dtype, Fn&& fn) {
  if (dtype == DType::kE4M3) {
    fn(Float8E4M3{});
  } else if (dtype == DType::kBF16) {
    fn(BFloat16{});
  } else {
    fn(0.0f);
  }
}

}  // namespace snapmla::cuda
