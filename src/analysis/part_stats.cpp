#include "analysis/part_stats.h"

#include <algorithm>
#include <cmath>

#include "numeric/float_types.h"

namespace snapmla::analysis {
namespace {

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

}  // namespace

PartStats::PartStats(std::int64_t width)
    : width_(width),
      bins_(kBins),
      channel_largest_(sz(width)),
      channel_squares_(sz(width)),
      channel_count_(sz(width)) {}

void PartStats::add(const float* rows, std::int64_t num_rows) {
  count_ += num_rows * width_;
  for (std::int64_t r = 0; r < num_rows; ++r) {
    for (std::size_t c = 0; c < sz(width_); ++c) {
      const float x = rows[sz(r * width_) + c];
      if (!numeric::is_finite(x)) {
        ++non_finite_;
        continue;
      }
      const float magnitude = std::fabs(x);
      if (magnitude == 0.0f) ++zeros_;
      ++bins_[numeric::bits_of(magnitude) >> 16];
      channel_largest_[c] = std::max(channel_largest_[c], magnitude);
      channel_squares_[c] += static_cast<double>(x) * x;
      sum_of_squares_ += static_cast<double>(x) * x;
      ++channel_count_[c];
    }
  }
}

float PartStats::largest() const {
  return channel_largest_.empty() ? 0.0f : *std::ranges::max_element(channel_largest_);
}

double PartStats::rms() const {
  const std::int64_t finite = count_ - non_finite_;
  return finite ? std::sqrt(sum_of_squares_ / static_cast<double>(finite)) : 0;
}

double PartStats::channel_rms(std::int64_t channel) const {
  const std::int64_t n = channel_count_[sz(channel)];
  return n ? std::sqrt(channel_squares_[sz(channel)] / static_cast<double>(n)) : 0;
}

double PartStats::percentile(double p) const {
  if (p >= 1) return largest();
  const double target = p * static_cast<double>(count_ - non_finite_);
  std::int64_t below = 0;
  for (std::size_t bin = 0; bin < kBins; ++bin) {
    below += bins_[bin];
    if (bins_[bin] == 0 || static_cast<double>(below) < target) continue;
    if (bin == 0) return 0;
    const auto low = static_cast<std::uint32_t>(bin) << 16;
    return std::min(numeric::float_of(low | 0x8000u), largest());
  }
  return 0;
}

std::vector<std::pair<int, std::int64_t>> PartStats::binades() const {
  std::vector<std::pair<int, std::int64_t>> all;
  for (std::size_t exponent = 1; exponent < 255; ++exponent) {
    std::int64_t n = 0;
    for (std::size_t i = 0; i < 128; ++i) n += bins_[exponent * 128 + i];
    if (n > 0 || !all.empty()) all.emplace_back(static_cast<int>(exponent) - 127, n);
  }
  while (!all.empty() && all.back().second == 0) all.pop_back();
  return all;
}

double PartStats::median_channel_largest() const {
  if (channel_largest_.empty()) return 0;
  std::vector<float> sorted = channel_largest_;
  std::ranges::sort(sorted);
  const std::size_t n = sorted.size();
  return (static_cast<double>(sorted[(n - 1) / 2]) + sorted[n / 2]) / 2;
}

std::vector<std::int64_t> PartStats::outlier_channels() const {
  const double limit = kOutlierFactor * median_channel_largest();
  std::vector<std::int64_t> found;
  for (std::int64_t c = 0; c < width_; ++c) {
    const float largest = channel_largest_[sz(c)];
    if (largest > 0 && largest >= limit) found.push_back(c);
  }
  std::ranges::stable_sort(found, [&](std::int64_t a, std::int64_t b) {
    return channel_largest_[sz(a)] > channel_largest_[sz(b)];
  });
  return found;
}

}  // namespace snapmla::analysis
