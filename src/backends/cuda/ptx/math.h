// Approximate functions of the special-function unit.
#pragma once

namespace snapmla::cuda::ptx {

// 2^x, relative error 2^-22; results below 2^-126 are flushed to zero; ex2(-inf) = 0, NaN stays.
__device__ __forceinline__ float ex2_approx_ftz(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2 x, absolute error about 2^-22; subnormal x counts as zero, lg2(0) = -inf.
__device__ __forceinline__ float lg2_approx_ftz(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, relative error 2^-23; subnormal x counts as zero, rcp(0) = inf.
__device__ __forceinline__ float rcp_approx_ftz(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace snapmla::cuda::ptx
