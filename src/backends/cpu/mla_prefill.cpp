// Naive causal attention of a prompt chunk. A work item is one (query, head); it visits key tiles
// of 64 anchored at position 0, so its bits do not depend on the chunk that the query came in.
#include <cmath>
#include <limits>

#include "backends/cpu/cpu_ops.h"
#include "backends/cpu/kernels.h"

namespace snapmla::cpu {
namespace {

constexpr std::int64_t kTile = 64;

void attend(const ops::MlaPrefillArgs& a, std::int64_t t, std::int64_t h) {
  const std::int64_t nope = a.k_nope.dim(2), rope = a.k_rope.dim(1), v_dim = a.v.dim(2);
  const std::int64_t keys = a.query_begin + t + 1;
  const float* q = a.q.row<float>(t, h);
  float* out = a.out.row<float>(t, h);
  std::fill_n(out, v_dim, 0.0f);
  float maximum = -std::numeric_limits<float>::infinity(), sum = 0;
  float scores[kTile], rope_scores[kTile];
  for (std::int64_t begin = 0; begin < keys; begin += kTile) {
    const std::int64_t n = std::min(kTile, keys - begin);
    dot_rows(q, a.k_nope.row<float>(begin, h), a.k_nope.stride(0), nope, n, scores);
    dot_rows(q + nope, a.k_rope.row<float>(begin), a.k_rope.stride(0), rope, n, rope_scores);
    float tile_maximum = maximum;
    for (std::int64_t j = 0; j < n; ++j) {
      scores[j] = (scores[j] + rope_scores[j]) * a.softmax_scale;
      tile_maximum = std::fmax(tile_maximum, scores[j]);
    }
    const float rescale = tile_maximum > maximum ? std::exp(maximum - tile_maximum) : 1.0f;
    maximum = tile_maximum;
    sum *= rescale;
    if (rescale != 1.0f) scale_add(out, out, rescale, 0.0f, v_dim);
    for (std::int64_t j = 0; j < n; ++j) {
      const float p = std::exp(scores[j] - maximum);
      sum += p;
      scale_add(out, a.v.row<float>(begin + j, h), 1.0f, p, v_dim);
    }
  }
  for (std::int64_t d = 0; d < v_dim; ++d) out[d] /= sum;
}

}  // namespace

void mla_prefill(ThreadPool& pool, const ops::MlaPrefillArgs& a) {
  // Heads outermost: neighbouring items share one head's keys and values in the cache.
  const std::int64_t tokens = a.q.dim(0), strips = (tokens + 15) / 16;
  pool.parallel_for(a.q.dim(1) * strips, [&](std::int64_t item) {
    const std::int64_t h = item / strips, begin = item % strips * 16;
    for (std::int64_t t = begin; t < std::min(tokens, begin + 16); ++t) attend(a, t, h);
  });
}

}  // namespace snapmla::cpu
