// Decode attention over an FP8 cache without a model: append 200 tokens, ask with 16 query heads,
// and compare with exact attention over the values before they were quantised.
#include <snapmla/snapmla.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

using namespace snapmla;

namespace {

constexpr std::int64_t kTokens = 200, kHeads = 16, kPages = (kTokens + kPageSize - 1) / kPageSize;
const float kScale = 1.0f / std::sqrt(128.0f + 64.0f);  // (nope + rope)^-0.5

std::vector<float> normal(std::int64_t n, std::uint32_t seed) {
  std::mt19937 bits(seed);
  std::normal_distribution<float> draw;
  std::vector<float> x(static_cast<std::size_t>(n));
  for (float& value : x) value = draw(bits);
  return x;
}

// Softmax attention of one head in double: out [512].
std::vector<double> exact(const float* q, const float* q_rope, const std::vector<float>& latent,
                          const std::vector<float>& rope) {
  std::vector<double> out(kKvLoraRank), score(kTokens);
  double top = -INFINITY, sum = 0;
  for (std::int64_t t = 0; t < kTokens; ++t) {
    double s = 0;
    for (int d = 0; d < kKvLoraRank; ++d) s += double{q[d]} * latent[t * kKvLoraRank + d];
    for (int d = 0; d < kQkRopeHeadDim; ++d) s += double{q_rope[d]} * rope[t * kQkRopeHeadDim + d];
    score[t] = kScale * s;
    top = std::max(top, score[t]);
  }
  for (double& s : score) sum += s = std::exp(s - top);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    for (int d = 0; d < kKvLoraRank; ++d) out[d] += score[t] / sum * latent[t * kKvLoraRank + d];
  }
  return out;
}

}  // namespace

int main() {
  Backend backend("cpu");

  // The cache: one pool of pages, 41216 bytes each. Slot = page * 64 + offset.
  std::vector<std::uint8_t> pool(kPages * page_layout(KvCacheFormat::kFp8).page_bytes);
  const auto cache = KvCacheView::of_pool(pool.data(), kPages, KvCacheFormat::kFp8);
  const auto latent = normal(kTokens * kKvLoraRank, 1), rope = normal(kTokens * kQkRopeHeadDim, 2);
  std::vector<std::int64_t> slots(kTokens);
  for (std::int64_t t = 0; t < kTokens; ++t) slots[t] = t;
  backend.append_kv({.latent = TensorView::of(latent.data(), {kTokens, kKvLoraRank}),
                     .rope = TensorView::of(rope.data(), {kTokens, kQkRopeHeadDim}),
                     .slot_mapping = TensorView::of(slots.data(), {kTokens}),
                     .cache = cache});

  // One query token per request, quantised per (token, head) as the cache is per token.
  const auto q = normal(kHeads * kKvLoraRank, 3), q_rope = normal(kHeads * kQkRopeHeadDim, 4);
  std::vector<std::uint8_t> q8(kHeads * kKvLoraRank);
  std::vector<BFloat16> q_rope16(kHeads * kQkRopeHeadDim);
  std::vector<float> q_scale(kHeads);
  const TensorView q8_view(q8.data(), DType::kE4M3, {1, 1, kHeads, kKvLoraRank});
  const auto q_rope_view = TensorView::of(q_rope16.data(), {1, 1, kHeads, kQkRopeHeadDim});
  const auto q_scale_view = TensorView::of(q_scale.data(), {1, 1, kHeads});
  backend.quantize_q({.q_latent = TensorView::of(q.data(), {1, 1, kHeads, kKvLoraRank}),
                      .q_rope = TensorView::of(q_rope.data(), {1, 1, kHeads, kQkRopeHeadDim}),
                      .q_latent_out = q8_view,
                      .q_rope_out = q_rope_view,
                      .q_scale_out = q_scale_view});

  std::vector<std::int32_t> table(kPages);
  for (std::int64_t p = 0; p < kPages; ++p) table[p] = static_cast<std::int32_t>(p);
  const std::int32_t length = kTokens;
  std::vector<float> out(kHeads * kKvLoraRank), lse(kHeads);
  backend.mla_decode({.q_latent = q8_view,
                      .q_rope = q_rope_view,
                      .q_scale = q_scale_view,
                      .cache = cache,
                      .block_table = TensorView::of(table.data(), {1, kPages}),
                      .cache_seqlens = TensorView::of(&length, {1}),
                      .softmax_scale = kScale,
                      .out = TensorView::of(out.data(), {1, 1, kHeads, kKvLoraRank}),
                      .lse = TensorView::of(lse.data(), {1, kHeads, 1})});

  double error = 0, norm = 0;
  for (std::int64_t h = 0; h < kHeads; ++h) {
    const auto want = exact(&q[h * kKvLoraRank], &q_rope[h * kQkRopeHeadDim], latent, rope);
    for (int d = 0; d < kKvLoraRank; ++d) {
      error += std::pow(out[h * kKvLoraRank + d] - want[d], 2);
      norm += want[d] * want[d];
    }
  }
  std::printf("%zu bytes of cache for %lld tokens, relative error %.3f\n", pool.size(),
              static_cast<long long>(kTokens), std::sqrt(error / norm));
  return std::sqrt(error / norm) < 0.1 ? 0 : 1;
}
