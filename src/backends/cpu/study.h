// What only the study operations need on the host (ops/study.h).
#pragma once

#include <cstdint>

#include "backends/cpu/attention_kernels.h"

namespace snapmla::cpu {

// As values() with P as softmax() left it, but products are added as numeric/tensor_core.h says: v
// are e4m3 values (else their exponents are taken all the same), not those 1 / latent_unscale()
// times as large that load_keys makes of an FP8 page. one_level: the running sum itself, in units
// of sigma, is the accumulator; else every block starts from zero.
void tensor_core_values(const RowBlock& block, const float* p, const float* v,
                        std::int64_t v_stride, bool one_level, float* out, std::int64_t out_stride);

}  // namespace snapmla::cpu
