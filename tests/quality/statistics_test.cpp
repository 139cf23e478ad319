#include "quality/statistics.h"

#include <gtest/gtest.h>

#include <cmath>

#include "quality/metrics.h"

namespace snapmla::quality {
namespace {

// Against intervals published with the shipped model (models/snapmla-20m/evaluation.md), made with
// Python, and the closed form at the ends.
TEST(Wilson, KnownIntervals) {
  EXPECT_NEAR(wilson(351, 400).low, 0.842, 5e-4);
  EXPECT_NEAR(wilson(351, 400).high, 0.906, 5e-4);
  EXPECT_NEAR(wilson(397, 400).low, 0.978, 5e-4);
  EXPECT_NEAR(wilson(397, 400).high, 0.997, 5e-4);
  EXPECT_NEAR(wilson(400, 400).low, 400 / (400 + 3.841459), 1e-6);
  EXPECT_EQ(wilson(400, 400).high, 1.0);
  EXPECT_EQ(wilson(0, 5).low, 0.0);
  EXPECT_EQ(wilson(0, 0).high, 1.0);
}

TEST(McNemar, ExactBinomialTails) {
  EXPECT_DOUBLE_EQ(mcnemar(0, 0), 1);
  EXPECT_NEAR(mcnemar(0, 5), 2.0 / 32, 1e-12);
  EXPECT_NEAR(mcnemar(9, 1), 2.0 * 11 / 1024, 1e-12);
  EXPECT_NEAR(mcnemar(3, 3), 1, 1e-12);
  EXPECT_NEAR(mcnemar(25, 10), 0.016674, 1e-4);  // scipy.stats.binomtest(10, 35)
  EXPECT_LT(mcnemar(400, 0), 1e-100);
}

TEST(PairedDifference, BonettPrice) {
  // n 100, 5 lost, 1 won: p = 6/102 and 2/102, difference -4/102.
  const Interval i = paired_difference(5, 1, 100);
  const double d = -4.0 / 102, half = 1.959964 * std::sqrt((8.0 / 102 - d * d) / 102);
  EXPECT_NEAR(i.low, d - half, 1e-6);
  EXPECT_NEAR(i.high, d + half, 1e-6);
  EXPECT_LT(paired_difference(0, 0, 400).high, 0.01) << "400 equal pairs must suffice for a point";
  EXPECT_GT(paired_difference(0, 0, 100).high, 0.01) << "and 100 must not";
  EXPECT_EQ(paired_difference(0, 0, 0).low, -1);
}

TEST(Bootstrap, OfAMeanIsItsNormalInterval) {
  const auto mean = [](std::span<const std::int64_t> index) {
    double sum = 0;
    for (const std::int64_t i : index) sum += i % 2 ? 1.0 : 0.0;
    return sum / static_cast<double>(index.size());
  };
  const Interval i = bootstrap(400, mean);
  EXPECT_NEAR(i.low, 0.5 - 1.96 * 0.025, 0.004);
  EXPECT_NEAR(i.high, 0.5 + 1.96 * 0.025, 0.004);
  const Interval again = bootstrap(400, mean);
  EXPECT_EQ(i.low, again.low);
  EXPECT_EQ(bootstrap(1, mean).low, bootstrap(1, mean).high);
}

TEST(Metrics, KlAndNllByHand) {
  // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2 = ln 2 / 4.
  const std::vector<float> p = {std::log(2.0f) + 5, 5, 5}, q = {1, 1 + std::log(2.0f), 1};
  const RowScore s = score_row(p, q, 1);
  EXPECT_NEAR(s.kl, std::log(2.0) / 4, 1e-6);
  EXPECT_NEAR(s.nll, std::log(2.0), 1e-6);
  EXPECT_FALSE(s.same);
  // Not the other way round: from p to the uniform, 1/2 ln(3/2) + 1/2 ln(3/4).
  const std::vector<float> uniform = {0, 0, 0};
  EXPECT_NEAR(score_row(p, uniform, 0).kl, 0.5 * std::log(1.5) + 0.5 * std::log(0.75), 1e-6);
  const RowScore self = score_row(p, p, 0);
  EXPECT_EQ(self.kl, 0);
  EXPECT_TRUE(self.same);
  const std::vector<float> tie = {1, 1, 0}, first = {2, 1, 0};
  EXPECT_TRUE(score_row(tie, first, 0).same) << "ties go to the lowest index";
}

TEST(Metrics, BrokenRowsAreWorse) {
  const std::vector<float> p = {1, 2}, nan = {1, NAN}, infinite = {1, INFINITY};
  for (const auto& row : {nan, infinite}) {
    EXPECT_GT(score_row(p, row, 0).nll, 1e5);
    EXPECT_GT(score_row(p, row, 0).kl, 1e5);
    EXPECT_FALSE(score_row(p, row, 0).same);
  }
}

TEST(Metrics, RowsWithoutATargetAreNotScored) {
  ThreadPool pool(2);
  const std::vector<float> p = {0, 1, 5, 0}, q = {0, 1, 0, 5};
  const std::vector<std::int32_t> targets = {1, -1};
  const auto s = score_rows(pool, p, q, 2, targets);
  ASSERT_EQ(s.size(), 2u);
  EXPECT_GT(s[0].nll, 0);
  EXPECT_EQ(s[1].nll, 0);
  EXPECT_EQ(s[1].kl, 0);
}

}  // namespace
}  // namespace snapmla::quality
