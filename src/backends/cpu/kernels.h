// The SIMD inner loops, chosen at run time for the processor. Every result depends on its own
// operands only, never on how many rows are computed beside it.
#pragma once

#include <cstdint>

#include "snapmla/dtype.h"

namespace snapmla::cpu {

// y[d] = y[d] * rescale + factor * x[d]
void scale_add(float* y, const float* x, float rescale, float factor, std::int64_t n);

void decode_bf16(const BFloat16* from, float* to, std::int64_t n);
void decode_e4m3(const Float8E4M3* from, float scale, float* to,
                 std::int64_t n);  // to = value * scale

const char* simd_target();  // "AVX3", "AVX2", ...

}  // namespace snapmla::cpu
