#include "model/rope_table.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace snapmla::model {
namespace {

double yarn_mscale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

}  // namespace

std::vector<double> rope_frequencies(const ModelConfig& config) {
  const auto width = static_cast<double>(config.qk_rope_head_dim);
  std::vector<double> inv_freq(static_cast<std::size_t>(config.qk_rope_head_dim / 2));
  for (std::size_t j = 0; j < inv_freq.size(); ++j) {
    inv_freq[j] = std::pow(config.rope_theta, -2.0 * static_cast<double>(j) / width);
  }
  if (!config.yarn) return inv_freq;
  const RopeScaling& y = *config.yarn;
  // The pair that turns `rotations` times over the original context.
  const auto pair_of = [&](double rotations) {
    return width *
           std::log(static_cast<double>(y.original_max_position_embeddings) /
                    (rotations * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(config.rope_theta));
  };
  const double low = std::max(std::floor(pair_of(y.beta_fast)), 0.0);
  double high = std::min(std::ceil(pair_of(y.beta_slow)), width - 1.0);
  if (low == high) high += 0.001;
  for (std::size_t j = 0; j < inv_freq.size(); ++j) {
    const double ramp = std::clamp((static_cast<double>(j) - low) / (high - low), 0.0, 1.0);
    inv_freq[j] = inv_freq[j] * (1.0 - ramp) + inv_freq[j] / y.factor * ramp;
  }
  return inv_freq;
}

std::vector<float> build_rope_table(const ModelConfig& config, std::int64_t positions) {
  const std::vector<double> inv_freq = rope_frequencies(config);
  double multiplier = 1.0;
  if (config.yarn) {
    const RopeScaling& y = *config.yarn;
    multiplier = y.mscale != 0.0 && y.mscale_all_dim != 0.0
                     ? yarn_mscale(y.factor, y.mscale) / yarn_mscale(y.factor, y.mscale_all_dim)
                     : yarn_mscale(y.factor, 1.0);
  }
  std::vector<float> table;
  table.reserve(static_cast<std::size_t>(positions * config.qk_rope_head_dim));
  for (std::int64_t p = 0; p < positions; ++p) {
    for (double frequency : inv_freq) {
      const double angle = static_cast<double>(p) * frequency;
      table.push_back(static_cast<float>(std::cos(angle) * multiplier));
      table.push_back(static_cast<float>(std::sin(angle) * multiplier));
    }
  }
  return table;
}

}  // namespace snapmla::model
