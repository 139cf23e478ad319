// The inner parts of linear layers on the host, chosen at run time for the processor.
#pragma once

#include <cstdint>

#include "ops/op_set.h"

namespace snapmla::cpu {

// out[t * out_stride + n - first] = sum_k x[t * x_stride + k] * W[n, k] for features n in
// [first, last) and all tokens t. A few tokens take the weights straight from memory; many share
// rows that were decoded once. Both add in the same order: a token's bits do not depend on the
// number of tokens, nor on how the features are cut. first: a multiple of 8.
void linear_features(const ops::Weight& w, std::int64_t first, std::int64_t last, const float* x,
                     std::int64_t x_stride, std::int64_t tokens, float* out,
                     std::int64_t out_stride);

// out = silu(gate) * up; out may alias gate.
void swiglu_row(const float* gate, const float* up, float* out, std::int64_t n);

}  // namespace snapmla::cpu
