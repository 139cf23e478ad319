// Naive causal attention of a prompt chunk, in the terms of attention_kernels.h. A work item is one
// head and up to 16 queries; it visits key tiles of 64 anchored at position 0, so a query's bits do
// not depend on the chunk that it came in.
#include <algorithm>
#include <vector>

#include "backends/cpu/attention_kernels.h"
#include "backends/cpu/cpu_ops.h"

namespace snapmla::cpu {
namespace {

constexpr std::int64_t kTile = 64;

struct Scratch {
  std::vector<float> out, values;  // [16, v_dim]
  float scores[kTile * kRowLanes];
};

void attend(const ops::MlaPrefillArgs& a, std::int64_t h, std::int64_t first, std::int64_t rows) {
  thread_local Scratch s;
  const std::int64_t nope = a.k_nope.dim(2), rope = a.k_rope.dim(1), v_dim = a.v.dim(2);
  s.out.assign(static_cast<std::size_t>(kRowLanes * v_dim), 0.0f);
  s.values.resize(s.out.size());
  RowBlock block;
  block.rows = rows;
  std::fill_n(block.factor, rows, a.softmax_scale * numeric::kLog2E);
  const float* q = a.q.row<float>(first, h);
  const std::int64_t keys = a.query_begin + first + rows;  // that the last row sees
  for (std::int64_t begin = 0; begin < keys; begin += kTile) {
    const std::int64_t n = std::min(kTile, keys - begin);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t seen = a.query_begin + first + r + 1 - begin;
      block.visible[r] = static_cast<std::int32_t>(std::clamp<std::int64_t>(seen, 0, n));
    }
    scores(q, a.q.stride(0), rows, a.k_nope.row<float>(begin, h), a.k_nope.stride(0), n, nope,
           false, s.scores);
    scores(q + nope, a.q.stride(0), rows, a.k_rope.row<float>(begin), a.k_rope.stride(0), n, rope,
           true, s.scores);
    softmax(block, n, nullptr, nullptr, false, s.scores);
    values(block, s.scores, a.v.row<float>(begin, h), a.v.stride(0), v_dim, 1.0f, false,
           s.values.data(), s.out.data(), v_dim);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* from = s.out.data() + r * v_dim;
    float* to = a.out.row<float>(first + r, h);
    for (std::int64_t d = 0; d < v_dim; ++d) to[d] = from[d] / block.state[r].sum;
  }
}

}  // namespace

void mla_prefill(ThreadPool& pool, const ops::MlaPrefillArgs& a) {
  // Heads outermost: neighbouring items share one head's keys and values in the processor's cache.
  const std::int64_t tokens = a.q.dim(0), strips = (tokens + kRowLanes - 1) / kRowLanes;
  pool.parallel_for(a.q.dim(1) * strips, [&](std::int64_t item) {
    const std::int64_t first = item % strips * kRowLanes;
    attend(a, item / strips, first, std::min(kRowLanes, tokens - first));
  });
}

}  // namespace snapmla::cpu
