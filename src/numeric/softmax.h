// The online softmax with P quantised per block of tokens, in the log domain (base 2).
//
//   y_j  = x_j + log2 s_k[j]                   V's scale is fused into P
//   m    = max y_j over the block's valid tokens
//   P'_j = e4m3(448 * 2^(y_j - m))             the largest code is exactly 448
//   T    = sum_j P'_j * code_j                 started from zero in each block (two-level
//   accumulation) R    : lazy reference, moved to m only when m > R + 40 O    = O * 2^(R_old -
//   R_new) + sigma * T,  sigma = 2^(m - R) / 448 l    likewise, += sigma * sum_j P'_j / s_k[j] with
//   the ROUNDED P'
//
// Source: SnapMLA, scale-fused PV pipeline; the log-domain form and the lazy reference are this
// project's.
#pragma once

#include <cmath>

#include "numeric/float_types.h"

namespace snapmla::numeric {

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;
inline constexpr float kReferenceSlack = 40.0f;  // binades that m may exceed R before R moves

// log2 of a token's scale; a scale that is not positive makes the token NaN.
SNAPMLA_HD float log2_scale(float scale) { return scale > 0.0f ? log2f(scale) : quiet_nan(); }

// State of one row between blocks.
struct RowState {
  float reference = -INFINITY;  // R
  float sum = 0.0f;             // l
};

// What to do with one block: O = O * rescale + sigma * T.
struct BlockFactors {
  float rescale = 1.0f;
  float sigma = 0.0f;
  float maximum = 0.0f;  // m, for quantize_p
  bool skip = false;     // every token masked: the block contributes nothing
};

// m: maximum of the non-NaN y (-inf if there is none); has_nan: some valid y is NaN, which must
// reach the row.
SNAPMLA_HD BlockFactors begin_block(RowState& row, float m, bool has_nan) {
  BlockFactors f;
  if (m == negative_infinity()) {
    if (!has_nan) {
      f.skip = true;
      return f;
    }
    m = row.reference == negative_infinity() ? 0.0f : row.reference;
  }
  if (row.reference == negative_infinity()) {
    row.reference = m;
  } else if (m > row.reference + kReferenceSlack) {
    f.rescale = exp2f(row.reference - m);
    row.reference = m;
    row.sum *= f.rescale;
  }
  f.maximum = m;
  f.sigma = exp2f(m - row.reference) / kE4M3Max;
  return f;
}

SNAPMLA_HD Float8E4M3 quantize_p(float y, float m) {
  return e4m3_from_float(kE4M3Max * exp2f(y - m));
}

// lse of a finished row in base 2: R + log2 l, -inf for an empty row.
SNAPMLA_HD float row_lse2(const RowState& row) {
  return row.sum == 0.0f ? negative_infinity() : row.reference + log2f(row.sum);
}

}  // namespace snapmla::numeric
