// Two fp64 attentions over the cache as it is stored, sharing no code with the backends.
#pragma once

#include "agreement/decode_problem.h"

namespace snapmla::agreement {

struct Fp64 {
  // Plain softmax attention over the dequantised keys.
  Result exact;
  // FP8: the scheme (P rounded to e4m3 per block and row in the log domain, rounded P in the sum,
  // splits, accumulation in one or two levels, the tensor core's cut) with everything else in
  // double. Its distance from `exact` is what the scheme costs; a backend may add 5%. Otherwise the
  // same as `exact`.
  Result emulated;
};

Fp64 fp64_attention(const Problem& p);

}  // namespace snapmla::agreement
