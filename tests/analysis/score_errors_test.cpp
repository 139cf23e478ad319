// Scores and probabilities in one pass, against keeping everything.
#include "analysis/score_errors.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace snapmla::analysis {
namespace {

long double log_sum(const std::vector<long double>& x) {
  long double top = x[0], sum = 0;
  for (long double v : x) top = std::max(top, v);
  for (long double v : x) sum += std::exp(v - top);
  return top + std::log(sum);
}

long double kl(const std::vector<long double>& exact, const std::vector<long double>& changed) {
  const long double a = log_sum(exact), b = log_sum(changed);
  long double sum = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const long double log_p = exact[i] - a;
    sum += std::exp(log_p) * (log_p - (changed[i] - b));
  }
  return sum;
}

// Three variants: small errors, errors larger than the scores, a shift that changes nothing.
TEST(QueryScores, AgreeWithKeepingEverything) {
  for (const double size : {0.5, 5.0, 900.0}) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    QueryScores scores(3);
    std::vector<long double> exact, small, large;
    long double squares = 0, largest = 0;
    for (int i = 0; i < 500; ++i) {
      const double s = size * normal(random) + 0.01 * size * i;  // the largest comes late
      const double errors[3] = {0.01 * normal(random), 2 * size * normal(random), 12.5};
      scores.add(s, errors);
      exact.push_back(s);
      small.push_back(s + errors[0]);
      large.push_back(s + errors[1]);
      squares += errors[0] * errors[0];
      largest = std::max(largest, std::fabs(static_cast<long double>(errors[0])));
    }
    EXPECT_EQ(scores.keys(), 500);
    EXPECT_NEAR(scores.variant(0).squares, static_cast<double>(squares), 1e-12);
    EXPECT_EQ(scores.variant(0).largest, static_cast<double>(largest));
    const auto near = [](double got, long double want) {
      EXPECT_NEAR(got, static_cast<double>(want), 1e-9 * static_cast<double>(want) + 1e-12);
    };
    near(scores.variant(0).kl, kl(exact, small));
    near(scores.variant(1).kl, kl(exact, large));
    near(scores.variant(2).kl, 0);
    EXPECT_GT(scores.variant(1).kl, scores.variant(0).kl);
  }
}

TEST(QueryScores, OneKeyCannotBeGotWrong) {
  QueryScores scores(1);
  const double error = 3;
  scores.add(-5, &error);
  EXPECT_NEAR(scores.variant(0).kl, 0, 1e-15);
  EXPECT_EQ(scores.variant(0).largest, 3);
}

TEST(QueryScores, NanStays) {
  QueryScores scores(2);
  const double bad[2] = {std::nan(""), 0.5}, good[2] = {0.25, 0.5};
  scores.add(1, good);
  scores.add(2, bad);
  scores.add(3, good);
  EXPECT_TRUE(std::isnan(scores.variant(0).kl));
  EXPECT_TRUE(std::isnan(scores.variant(0).squares));
  EXPECT_NEAR(scores.variant(1).kl, 0, 1e-15);
}

TEST(Moments, StandardDeviation) {
  Moments m;
  EXPECT_EQ(m.standard_deviation(), 0);
  for (double x : {1e6 + 1, 1e6 + 2, 1e6 + 3, 1e6 + 4}) m.add(x);
  EXPECT_NEAR(m.standard_deviation(), std::sqrt(1.25), 1e-9);
}

}  // namespace
}  // namespace snapmla::analysis
