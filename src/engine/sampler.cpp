#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "snapmla/error.h"

namespace snapmla::engine {
namespace {

void require(bool ok, const char* field, double got, const char* accepted) {
  if (ok) return;
  throw Error(ErrorCode::kInvalidArgument,
              std::string(field) + ": got " + std::to_string(got) + ", accepted is " + accepted);
}

}  // namespace

std::int32_t argmax(std::span<const float> logits) {
  std::int32_t best = 0;
  float value = -std::numeric_limits<float>::infinity();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > value) {
      value = logits[i];
      best = static_cast<std::int32_t>(i);
    }
  }
  return best;
}

Sampler::Sampler(const SamplingParams& params) : params_(params), state_(params.seed) {
  require(std::isfinite(params.temperature) && params.temperature >= 0, "temperature",
          params.temperature, "a finite number >= 0 (0 = greedy)");
  require(params.top_p > 0 && params.top_p <= 1, "top_p", params.top_p, "0 < top_p <= 1");
  require(params.min_p >= 0 && params.min_p < 1, "min_p", params.min_p, "0 <= min_p < 1");
  require(params.top_k >= 0, "top_k", params.top_k, "an integer >= 0 (0 = off)");
}

// splitmix64: one multiply-xorshift chain per draw, the same on every platform.
double Sampler::uniform() {
  std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1.0p-53;
}

std::int32_t Sampler::sample(std::span<const float> logits) {
  const std::int32_t best = argmax(logits);
  if (params_.temperature == 0) return best;
  const float top = logits[static_cast<std::size_t>(best)];
  if (!std::isfinite(top)) return best;

  candidates_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    // The difference first: it is exact enough for any temperature and never overflows to NaN.
    const double p = std::exp((static_cast<double>(logits[i]) - top) / params_.temperature);
    if (p > 0 && p >= params_.min_p) {  // false for NaN; the best token has p = 1
      candidates_.push_back({static_cast<float>(p), static_cast<std::int32_t>(i)});
    }
  }
  std::ranges::sort(candidates_, [](const Candidate& a, const Candidate& b) {
    return a.probability != b.probability ? a.probability > b.probability : a.token < b.token;
  });
  if (params_.top_k > 0 && candidates_.size() > static_cast<std::size_t>(params_.top_k)) {
    candidates_.resize(static_cast<std::size_t>(params_.top_k));
  }
  double total = 0;
  for (const Candidate& c : candidates_) total += c.probability;
  if (params_.top_p < 1) {
    double kept = 0;
    std::size_t count = 0;
    while (count < candidates_.size() && kept < params_.top_p * total) {
      kept += candidates_[count++].probability;
    }
    candidates_.resize(std::max<std::size_t>(count, 1));
    total = kept;
  }
  double target = uniform() * total;
  for (const Candidate& c : candidates_) {
    target -= c.probability;
    if (target < 0) return c.token;
  }
  return candidates_.empty() ? best : candidates_.back().token;
}

}  // namespace snapmla::engine
