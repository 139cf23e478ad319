// Partial results of the FP8 kernel: O without the division by l. They lie as its accumulator
// fragments do, so that writer and readers move 16 bytes per lane.
//
// A partial result of one row tile and one half of the output dims is kRows x 256 floats, in blocks
// of 8 rows x 64 dims: block (m, n) holds, for thread 32 w + 4 g + t of 128, rows 8n + 2t, + 1 and
// dims 64m + 16w + 2g, + 1 as (row, dim) = (0, 0), (1, 0), (0, 1), (1, 1). `width`: kRows.
#pragma once

#include "backends/cuda/mla_decode/decode_params.h"

namespace snapmla::cuda {

__device__ __forceinline__ float4* fragments(const DecodeParams& p, int slot, int row_begin,
                                             int half, int width) {
  float* base =
      p.plan.out_accum + (static_cast<std::int64_t>(slot) * p.slot_rows + row_begin) * 512;
  return reinterpret_cast<float4*>(base + half * width * 256);
}

// R before the first token: so low that any finite logit moves it, with factor 2^(R - m) = 0.
inline constexpr float kNoReference = -1e30f;

// What a split's row has seen: R and l, so that O / l is its output and R + log2 l its lse in
// base 2.
struct RowState {
  float reference, sum;
};

__device__ __forceinline__ RowState* row_state(const DecodeParams& p, int slot, int row) {
  return reinterpret_cast<RowState*>(p.plan.lse_accum) + static_cast<std::int64_t>(slot) * p.rows +
         row;
}

__device__ __forceinline__ int fragment_at(int m, int n, int width) {
  return (m * (width / 8) + n) * 128;
}

}  // namespace snapmla::cuda
