// Quantising one row of keys or queries, chosen at run time for the processor. Every bit as
// numeric/scale.h and numeric/float_types.h say: max, IEEE division and integer arithmetic leave
// no room for anything else.
#pragma once

#include "snapmla/kv_cache.h"

namespace snapmla::cpu {

// numeric::token_scale() of latent[512] and rope[64], each f32 or bf16.
float row_scale(const void* latent, DType latent_type, const void* rope, DType rope_type,
                ScaleMode mode);

// n elements of f32 or bf16 / scale, as numeric::quantize_latent() and quantize_rope().
void encode_e4m3(const void* from, DType type, std::int64_t n, float scale, Float8E4M3* to);
void encode_bf16(const void* from, DType type, std::int64_t n, float scale, BFloat16* to);
// The same without division.
void encode_f32(const void* from, DType type, std::int64_t n, float* to);

// ops::subtract_errors(), the same bits; width: a multiple of 64.
void subtract_errors(int count, const float* errors, const float* rows, int width, float* targets);

}  // namespace snapmla::cpu
