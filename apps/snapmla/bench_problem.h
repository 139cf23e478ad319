// The random data of `snapmla bench attention`, and the check of what a device made of them.
#pragma once

#include "bench_device.h"

namespace snapmla::app::bench {

// Keys and queries of unit variance, quantised as the cache format asks. Throws kOutOfMemory when
// the caches do not fit the free memory.
AttentionData make_attention_data(const AttentionCase& shape);

// Largest relative error (L2 over a row) of sampled rows: against the ref backend, or, for ref's
// own results (independent), against an fp64 attention over the dequantised cache. Throws kInternal
// when a row is wrong: error or lse beyond what P's quantisation explains.
double verify(const AttentionCase& shape, AttentionData& data, const AttentionResult& result,
              bool independent);

}  // namespace snapmla::app::bench
