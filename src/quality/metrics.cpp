#include "quality/metrics.h"

#include <algorithm>
#include <cmath>

#include "engine/sampler.h"

namespace snapmla::quality {
namespace {

double log_sum_exp(std::span<const float> x) {
  const float top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (float v : x) sum += std::exp(static_cast<double>(v - top));
  return top + std::log(sum);
}

}  // namespace

RowScore score_row(std::span<const float> reference, std::span<const float> logits,
                   std::int32_t target) {
  // Finite, so that sums and JSON can hold it; no real row comes near.
  constexpr double kBroken = 1e6;
  RowScore s;
  const double z = log_sum_exp(logits);
  s.nll = z - logits[static_cast<std::size_t>(target)];
  if (reference.data() != logits.data()) {
    const double zr = log_sum_exp(reference);
    for (std::size_t v = 0; v < logits.size(); ++v) {
      const double log_p = reference[v] - zr;
      s.kl += std::exp(log_p) * (log_p - (logits[v] - z));
    }
    s.kl = std::max(s.kl, 0.0);  // rounding may leave -1e-17
    s.same = engine::argmax(reference) == engine::argmax(logits);
  }
  const bool broken = std::any_of(logits.begin(), logits.end(), [](float v) { return v != v; });
  if (broken || !std::isfinite(s.nll)) s = {kBroken, kBroken, false};
  return s;
}

std::vector<RowScore> score_rows(ThreadPool& pool, const std::vector<float>& reference,
                                 const std::vector<float>& logits, std::int64_t vocab,
                                 std::span<const std::int32_t> targets) {
  std::vector<RowScore> scores(targets.size());
  pool.parallel_for(static_cast<std::int64_t>(targets.size()), [&](std::int64_t i) {
    const auto at = static_cast<std::size_t>(i), width = static_cast<std::size_t>(vocab);
    if (targets[at] < 0) return;
    scores[at] = score_row(std::span(reference).subspan(at * width, width),
                           std::span(logits).subspan(at * width, width), targets[at]);
  });
  return scores;
}

}  // namespace snapmla::quality
