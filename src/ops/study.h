// Operations for measuring what the parts of the scheme are worth, beside OpSet's own: storing
// tokens by another rule, and decode over an F32 page that holds values a real page could not.
#pragma once

#include <cstdint>

#include "numeric/store_rule.h"
#include "snapmla/kv_cache.h"
#include "snapmla/mla.h"

namespace snapmla::ops {

// Stores tokens by `rule`.
//   FP8 cache: rule must satisfy stores_in_fp8(); the pages are read by the ordinary operations.
//   F32 cache: the pages hold code * scale, so fetch_dequant reads them as they are; the scales go
//   to cache.scale, [num_pages, 64] f32 with scale_page_stride, which the caller provides.
struct StudyAppendArgs {
  TensorView latent;        // [num_tokens, 512] f32
  TensorView rope;          // [num_tokens, 64] f32
  TensorView slot_mapping;  // [num_tokens] i64; the tokens of a sequence in order
  KvCacheView cache;
  numeric::StoreRule rule;
};

// How PV is added up. kTensorCore*: products in groups of 32, cut to 14 bits
// (numeric/tensor_core.h)
enum class Accumulation : std::uint8_t { kTwoLevel, kOneLevel, kTensorCore, kTensorCoreOneLevel };

struct StudyNumerics {
  int p_block = 128;       // 64 or 128
  bool quantise_p = true;  // false: P stays in f32
  Accumulation accumulation = Accumulation::kTwoLevel;
};

// mla_decode over an F32 cache with scales, as study_append leaves it: codes are value / scale, and
// everything after them is numeric/softmax.h, as over an FP8 cache. decode.q_latent is e4m3 (bf16
// or f32 for a query that is not quantised), q_rope bf16 or f32, q_scale [batch, seqlen_q, heads]
// or empty for 1. decode.numerics is not used.
struct StudyDecodeArgs {
  MlaDecodeArgs decode;
  StudyNumerics numerics;
};

// The rule, token by token, on the host. Tokens [begin, end) of the arguments.
void study_append_rows(const StudyAppendArgs& args, std::int64_t begin, std::int64_t end);
// Exchanges scales where the rule's fault is kNeighbour; after all tokens of a call are stored.
void study_exchange_scales(const StudyAppendArgs& args);

}  // namespace snapmla::ops
