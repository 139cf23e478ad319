// Ranges and distributions of one part of the cache, latent or RoPE, in one pass over its rows and
// in constant memory: counts of magnitudes in bins of 1/128 of a binade, and per channel the
// largest magnitude and the sum of squares.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace snapmla::analysis {

// A channel whose largest magnitude is at least this many times the median channel's.
inline constexpr double kOutlierFactor = 4;

class PartStats {
 public:
  explicit PartStats(std::int64_t width);

  void add(const float* rows, std::int64_t num_rows);  // [num_rows, width]

  std::int64_t width() const { return width_; }
  std::int64_t count() const { return count_; }            // elements, all
  std::int64_t non_finite() const { return non_finite_; }  // left out of everything below
  std::int64_t zeros() const { return zeros_; }
  float largest() const;  // magnitude
  double rms() const;
  const std::vector<float>& channel_largest() const { return channel_largest_; }  // [width]
  double channel_rms(std::int64_t channel) const;

  // The magnitude that a share `p` (0 to 1) of the elements does not exceed, to 1/256 of itself;
  // exact for p = 1.
  double percentile(double p) const;

  // {e, elements with 2^e <= |x| < 2^(e+1)}, rising from the first to the last binade that holds
  // any. Zeros and subnormals of f32 are not among them.
  std::vector<std::pair<int, std::int64_t>> binades() const;

  double median_channel_largest() const;
  // Channels of kOutlierFactor, the largest first.
  std::vector<std::int64_t> outlier_channels() const;

 private:
  static constexpr std::size_t kBins = 0x7f80;  // finite magnitudes by their upper 15 bits

  std::int64_t width_, count_ = 0, non_finite_ = 0, zeros_ = 0;
  double sum_of_squares_ = 0;
  std::vector<std::int64_t> bins_;
  std::vector<float> channel_largest_;
  std::vector<double> channel_squares_;
  std::vector<std::int64_t> channel_count_;  // finite elements
};

}  // namespace snapmla::analysis
