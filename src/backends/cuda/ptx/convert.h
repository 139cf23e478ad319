// Conversions between f32, f16x2 and e4m3x2, and packed f16 arithmetic.
#pragma once

#include <cstdint>

namespace snapmla::cuda::ptx {

// Four e4m3 codes, x0 in the low byte: clamped to +-448, round to nearest even, NaN is 0x7f.
__device__ __forceinline__ std::uint32_t cvt_e4m3x4(float x0, float x1, float x2, float x3) {
  std::uint32_t codes;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}"
      : "=r"(codes)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return codes;
}

// The values of the four codes as f16 (exact): codes 0, 1 in `low`, 2, 3 in `high`.
__device__ __forceinline__ void cvt_f16x4_from_e4m3x4(std::uint32_t codes, std::uint32_t& low,
                                                      std::uint32_t& high) {
  asm("{\n"
      ".reg .b16 l, h;\n"
      "mov.b32 {l, h}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, l;\n"
      "cvt.rn.f16x2.e4m3x2 %1, h;\n"
      "}"
      : "=r"(low), "=r"(high)
      : "r"(codes));
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
