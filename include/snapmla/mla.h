// MLA decode attention in absorbed form: quantize_q and decode (the split is chosen from lengths
// alone).
//
//   score_ij = softmax_scale * (q_latent_i . c_j + q_rope_i . k_rope_j),  p = softmax_j,  out_i =
//   sum_j p_ij c_j
//
// Query token t of seqlen_q sees keys j < cache_seqlens - seqlen_q + t + 1 (causal, bottom-right
// aligned).
#pragma once

#include <cstdint>

#include "snapmla/kv_cache.h"
#include "snapmla/tensor.h"

namespace snapmla {

inline constexpr int kMaxHeadsQ = 128;
inline constexpr int kMaxSeqlenQ = 16;

// The absorbed query in the cache's number system: per (token, head) the rule of append_kv.
struct QuantizeQArgs {
  TensorView q_latent;      // [batch, seqlen_q, heads_q, 512] f32 or bf16: W_UK^T q_nope
  TensorView q_rope;        // [batch, seqlen_q, heads_q, 64] f32 or bf16
  TensorView q_latent_out;  // [batch, seqlen_q, heads_q, 512] e4m3
  TensorView q_rope_out;    // [batch, seqlen_q, heads_q, 64] bf16 = q_rope / q_scale
  TensorView q_scale_out;   // [batch, seqlen_q, heads_q] f32
  ScaleMode scale_mode = ScaleMode::kAmax;
};

// How P, the probabilities, is quantised before PV (FP8 cache only).
struct DecodeNumerics {
  int p_block =
      128;  // tokens per P scale: 128 or 64 (the paper's), see docs/design/0003-p-block.md
  bool two_level_accumulation =
      true;                        // false: one accumulator over the whole split, for study only
  bool tensor_core_model = false;  // true: emulate the tensor core's 14-bit accumulation (ref only)
};

struct MlaDecodeArgs {
  TensorView
      q_latent;       // [batch, seqlen_q, heads_q, 512] e4m3 (FP8 cache), bf16 (BF16) or f32 (F32)
  TensorView q_rope;  // [batch, seqlen_q, heads_q, 64] bf16 (FP8: divided by q_scale), or f32 (F32)
  TensorView q_scale;  // [batch, seqlen_q, heads_q] f32; empty unless the cache is FP8
  KvCacheView cache;
  TensorView block_table;  // [batch, max_pages] i32; entries past a request's pages are never read
  TensorView cache_seqlens;  // [batch] i32, counts the seqlen_q new tokens
  float softmax_scale = 0;   // (nope + rope)^-0.5 * yarn_factor^2; never 576^-0.5
  TensorView out;            // [batch, seqlen_q, heads_q, 512] bf16 or f32
  TensorView
      lse;  // [batch, heads_q, seqlen_q] f32, natural log, -inf for an empty row; may be empty
  int num_splits = 0;  // splits per request: 0 = chosen from the lengths alone (deterministic)
  DecodeNumerics numerics = {};
};

}  // namespace snapmla
