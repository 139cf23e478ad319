// The inner parts of attention on the host, chosen at run time for the processor: up to 16 rows
// against one block of up to 128 tokens. Decode and prefill are both written in these terms.
//
//   scores   S[j, r]  = sum_k q[r, k] * key[j, k]         register tiles over rows and tokens
//   softmax  P[j, r]  by numeric/softmax.h                rows in the lanes of a vector
//   values   O[r, d]  = O * rescale + sigma * sum_j P[j, r] * v[j, d]
//
// A row's bits depend on its own operands only, not on the rows beside it.
#pragma once

#include <cstdint>

#include "numeric/softmax.h"
#include "snapmla/kv_cache.h"

namespace snapmla::cpu {

inline constexpr std::int64_t kRowLanes = 16;  // rows of a block: the inner extent of S and P
inline constexpr std::int64_t kMaxBlock = 128;
inline constexpr std::int64_t kKeyWidth = kKvLoraRank + kQkRopeHeadDim;

// Up to 16 rows: their state between blocks, and what one block does to them.
struct RowBlock {
  std::int64_t rows = 0;
  float factor[kRowLanes] = {};  // base-2 logit = score * token scale * factor
  numeric::RowState state[kRowLanes];
  std::int32_t visible[kRowLanes] = {};  // tokens of the current block that the row sees
  float rescale[kRowLanes], sigma[kRowLanes];
};

// `count` tokens of a page, from token `first`, to rows [count, 576] of f32: latent, then rope,
// as stored (not times the token's scale). FP8 latents come out divided by latent_unscale().
void load_keys(const KvCacheView& cache, std::int64_t page, std::int64_t first, std::int64_t count,
               float* to);
float latent_unscale(KvCacheFormat format);

// s[j * 16 + r] (+)= sum_k q[r * q_stride + k] * keys[j * key_stride + k]
void scores(const float* q, std::int64_t q_stride, std::int64_t rows, const float* keys,
            std::int64_t key_stride, std::int64_t tokens, std::int64_t k, bool accumulate,
            float* s);

// Scores to P' in place. scale, log2_scale: [tokens], null where tokens have no scale. quantise:
// P' = e4m3(448 * 2^(y - m)), else the same without rounding. Sets rescale and sigma, updates
// state; rows that see nothing get visible 0, rescale 1 and sigma 0.
void softmax(RowBlock& block, std::int64_t tokens, const float* scale, const float* log2_scale,
             bool quantise, float* s);

// O of `width` columns. unscale multiplies sigma. one_level: one accumulator for all blocks (sigma
// goes into P, which is overwritten). scratch: [16, width].
void values(const RowBlock& block, float* p, const float* v, std::int64_t v_stride,
            std::int64_t width, float unscale, bool one_level, float* scratch, float* out,
            std::int64_t out_stride);

}  // namespace snapmla::cpu
