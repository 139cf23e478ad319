#include "backends/cpu/study.h"

#include <algorithm>
#include <cmath>

#include "backends/cpu/cpu_ops.h"
#include "numeric/tensor_core.h"

// The loops below are plain so that the compiler can vectorise them for what the machine has;
// joining two tokens in one pass, as g++ 12 likes to, would hinder it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SNAPMLA_CLONES                    \
  [[gnu::target_clones("default", "avx2", \
                       "arch=x86-64-v4")]] [[gnu::optimize("no-loop-unroll-and-jam")]]
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#undef SNAPMLA_CLONES
#define SNAPMLA_CLONES  // resolvers run before a sanitizer is ready
#endif
#else
#define SNAPMLA_CLONES
#endif

namespace snapmla::cpu {
namespace {

constexpr int kWidth = static_cast<int>(kKvLoraRank);

// t[d] = tensor_core_add(t[d], p of `count` tokens, their dim d) for all dims: with e the largest
// exponent, everything is cut to multiples of 2^(e - 13), in integers.
SNAPMLA_CLONES void add_group(const float* const* rows, const float* p, int count,
                              float* __restrict t) {
  alignas(64) float largest[kWidth], step[kWidth], inverse[kWidth], sum[kWidth];
  for (int d = 0; d < kWidth; ++d) largest[d] = std::fabs(t[d]);
  for (int j = 0; j < count; ++j) {
    const float* v = rows[j];
    const float weight = numeric::e4m3_power(p[j]);
    for (int d = 0; d < kWidth; ++d) {
      const float power = weight * numeric::e4m3_power(v[d]);
      largest[d] = power > largest[d] ? power : largest[d];
    }
  }
  for (int d = 0; d < kWidth; ++d) {
    const numeric::TensorCoreStep s = numeric::tensor_core_step(largest[d]);
    step[d] = s.step;
    inverse[d] = s.inverse;
    sum[d] = static_cast<float>(static_cast<std::int32_t>(t[d] * inverse[d]));
  }
  for (int j = 0; j < count; ++j) {
    const float* v = rows[j];
    const float weight = p[j];
    for (int d = 0; d < kWidth; ++d) {
      // At most 15 bits each and 33 of them: the sum is exact.
      sum[d] += static_cast<float>(static_cast<std::int32_t>(weight * v[d] * inverse[d]));
    }
  }
  for (int d = 0; d < kWidth; ++d) t[d] = numeric::tensor_core_cut(sum[d] * step[d]);
}

}  // namespace

void tensor_core_values(const RowBlock& block, const float* p, const float* v,
                        std::int64_t v_stride, bool one_level, float* out,
                        std::int64_t out_stride) {
  float t[kWidth];
  for (std::int64_t r = 0; r < block.rows; ++r, out += out_stride) {
    if (block.rescale[r] != 1.0f) {
      for (int d = 0; d < kWidth; ++d) out[d] *= block.rescale[r];
    }
    const float sigma = block.sigma[r];
    if (block.visible[r] == 0 || sigma == 0.0f) continue;
    for (int d = 0; d < kWidth; ++d) t[d] = one_level ? out[d] / sigma : 0.0f;
    // A sum that leaves f32 in this block's units cuts every product off whole.
    const bool overflows =
        std::any_of(t, t + kWidth, [](float x) { return std::fabs(x) > 0x1p100f; });
    if (overflows) continue;
    for (std::int64_t j = 0; j < block.visible[r]; j += numeric::kTensorCoreGroup) {
      const float* rows[numeric::kTensorCoreGroup];
      float weight[numeric::kTensorCoreGroup];
      const int count =
          static_cast<int>(std::min<std::int64_t>(numeric::kTensorCoreGroup, block.visible[r] - j));
      for (int i = 0; i < count; ++i) {
        rows[i] = v + (j + i) * v_stride;
        weight[i] = p[(j + i) * kRowLanes + r];
      }
      add_group(rows, weight, count, t);
    }
    for (int d = 0; d < kWidth; ++d) out[d] = one_level ? t[d] * sigma : out[d] + sigma * t[d];
  }
}

void study_append(ThreadPool& pool, const ops::StudyAppendArgs& a) {
  constexpr std::int64_t kStrip = 16;
  const std::int64_t tokens = a.latent.dim(0);
  pool.parallel_for((tokens + kStrip - 1) / kStrip, [&](std::int64_t strip) {
    ops::study_append_rows(a, strip * kStrip, std::min(tokens, (strip + 1) * kStrip));
  });
  ops::study_exchange_scales(a);
}

}  // namespace snapmla::cpu
