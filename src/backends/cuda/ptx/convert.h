// Conversions between f32, f16x2 and e4m3x2, and packed f16 arithmetic.
#pragma once

#include <cstdint>

namespace snapmla::cuda::ptx {

// Two e4m3 codes, `low` in the low byte: clamped to +-448, round to nearest even, NaN is 0x7f.
__device__ __forceinline__ std::uint32_t cvt_e4m3x2(float low, float high) {
  std::uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}

// The values of the two codes in bits 0..15, as f16 (exact).
__device__ __forceinline__ std::uint32_t cvt_f16x2_from_e4m3x2(std::uint32_t codes) {
  std::uint32_t values;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(values) : "h"(static_cast<std::uint16_t>(codes)));
  return values;
}

__device__ __forceinline__ std::uint32_t fma_f16x2(std::uint32_t a, std::uint32_t b,
                                                   std::uint32_t c) {
  std::uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ float2 cvt_f32x2_from_f16x2(std::uint32_t pair) {
  float2 f;
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
      : "=f"(f.x), "=f"(f.y)
      : "r"(pair));
  return f;
}

__device__ __forceinline__ std::uint32_t cvt_f16x2(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ std::uint32_t cvt_bf16x2(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace snapmla::cuda::ptx
