// Ranges and distributions against sorting everything, and on distributions that are known.
#include "analysis/part_stats.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>

namespace snapmla::analysis {
namespace {

std::vector<float> normal_rows(std::int64_t rows, std::int64_t width, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(rows * width));
  for (float& v : x) v = normal(random);
  return x;
}

// Against the sorted magnitudes; added in pieces of unequal length.
TEST(PartStats, AgreeWithSortingEverything) {
  const std::int64_t width = 48, rows = 1000;
  std::vector<float> x = normal_rows(rows, width, 1);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] *= std::exp2(static_cast<float>(i % 48) / 8 - 3);
  PartStats stats(width);
  for (std::int64_t at = 0, n = 1; at < rows;
       at += n, n = std::min<std::int64_t>(2 * n + 1, rows - at)) {
    stats.add(x.data() + at * width, n);
    if (at + n == rows) break;
  }
  std::vector<double> sorted;
  double squares = 0;
  std::map<int, std::int64_t> binades;
  std::vector<float> largest(48);
  for (std::size_t i = 0; i < x.size(); ++i) {
    sorted.push_back(std::fabs(x[i]));
    squares += static_cast<double>(x[i]) * x[i];
    ++binades[static_cast<int>(std::floor(std::log2(std::fabs(x[i]))))];
    largest[i % 48] = std::max(largest[i % 48], std::fabs(x[i]));
  }
  std::ranges::sort(sorted);
  EXPECT_EQ(stats.count(), rows * width);
  EXPECT_EQ(stats.non_finite(), 0);
  EXPECT_EQ(stats.largest(), static_cast<float>(sorted.back()));
  EXPECT_NEAR(stats.rms(), std::sqrt(squares / static_cast<double>(x.size())), 1e-12);
  EXPECT_EQ(stats.channel_largest(), largest);
  for (double p : {0.01, 0.5, 0.9, 0.99, 0.999, 0.9999}) {
    const auto rank = static_cast<std::size_t>(std::ceil(p * static_cast<double>(x.size()))) - 1;
    EXPECT_NEAR(stats.percentile(p) / sorted[rank], 1, 1.0 / 256 + 1e-6) << p;
  }
  EXPECT_EQ(stats.percentile(1), sorted.back());
  std::map<int, std::int64_t> got;
  for (const auto& [exponent, n] : stats.binades()) {
    if (n > 0) got[exponent] = n;
  }
  EXPECT_EQ(got, binades);
  EXPECT_EQ(stats.binades().front().first, binades.begin()->first);
  EXPECT_EQ(stats.binades().back().first, binades.rbegin()->first);
}

// The half-normal distribution's quantiles and the rms of a channel of standard deviation 3.
TEST(PartStats, KnowTheNormalDistribution) {
  std::vector<float> x = normal_rows(20000, 2, 2);
  for (std::size_t i = 1; i < x.size(); i += 2) x[i] *= 3;
  PartStats stats(2);
  stats.add(x.data(), 20000);
  EXPECT_NEAR(stats.channel_rms(0), 1, 0.02);
  EXPECT_NEAR(stats.channel_rms(1), 3, 0.06);
  PartStats one(1);
  const std::vector<float> y = normal_rows(100000, 1, 3);
  one.add(y.data(), 100000);
  EXPECT_NEAR(one.percentile(0.5), 0.6745, 0.01);
  EXPECT_NEAR(one.percentile(0.99), 2.5758, 0.04);
}

TEST(PartStats, ZerosAndWhatIsNotFiniteAreCountedApart) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const std::vector<float> x = {0, -0.0f, 4, nan, -8, inf};
  PartStats stats(3);
  stats.add(x.data(), 2);
  EXPECT_EQ(stats.count(), 6);
  EXPECT_EQ(stats.zeros(), 2);
  EXPECT_EQ(stats.non_finite(), 2);
  EXPECT_EQ(stats.largest(), 8);
  EXPECT_DOUBLE_EQ(stats.rms(), std::sqrt((16.0 + 64) / 4));
  EXPECT_EQ(stats.percentile(0.5), 0);
  EXPECT_EQ(stats.channel_largest(), (std::vector<float>{0, 8, 4}));
  const std::vector<std::pair<int, std::int64_t>> want = {{2, 1}, {3, 1}};
  EXPECT_EQ(stats.binades(), want);
}

TEST(PartStats, OutlierChannelsAreThoseFarAboveTheMedian) {
  std::vector<float> x = {1, 1.5f, -2, 4, 3.9f, 1, -32, 1};  // one row of 8; median 1.75, limit 7
  PartStats stats(8);
  stats.add(x.data(), 1);
  EXPECT_DOUBLE_EQ(stats.median_channel_largest(), 1.75);
  EXPECT_EQ(stats.outlier_channels(), (std::vector<std::int64_t>{6}));
  x = {7, 0, 0, 0, 0, 0, 0, 100};
  stats.add(x.data(), 1);  // medians of 7, 1.5, 2, 4, 3.9, 1, 32, 100: 3.95, limit 15.8
  EXPECT_EQ(stats.outlier_channels(), (std::vector<std::int64_t>{7, 6}));
}

TEST(PartStats, OfNothingAreZero) {
  const PartStats stats(4);
  EXPECT_EQ(stats.largest(), 0);
  EXPECT_EQ(stats.rms(), 0);
  EXPECT_EQ(stats.percentile(0.5), 0);
  EXPECT_TRUE(stats.binades().empty());
  EXPECT_TRUE(stats.outlier_channels().empty());
}

}  // namespace
}  // namespace snapmla::analysis
