// The SIMD inner loops, chosen at run time for the processor. Every result depends on its own
// operands only, never on how many rows are computed beside it.
#pragma once

#include <cstdint>

#include "snapmla/dtype.h"

namespace snapmla::cpu {

// out[r] = sum_k x[k] * w[r * stride + k] for `rows` rows of f32.
void dot_rows(const float* x, const float* w, std::int64_t stride, std::int64_t k,
              std::int64_t rows, float* out);

// out[t] = sum_k x[t * x_stride + k] * w[k] for `tokens` vectors x and one weight row.
void dot_tokens(const float* x, std::int64_t x_stride, const float* w, std::int64_t k,
                std::int64_t tokens, float* out);

// y[d] = y[d] * rescale + factor * x[d]
void scale_add(float* y, const float* x, float rescale, float factor, std::int64_t n);

void decode_bf16(const BFloat16* from, float* to, std::int64_t n);
void decode_e4m3(const Float8E4M3* from, float scale, float* to,
                 std::int64_t n);  // to = value * scale

const char* simd_target();  // "AVX3", "AVX2", ...

}  // namespace snapmla::cpu
