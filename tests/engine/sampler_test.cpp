// The sampler draws from the distribution it says: chi-square on fixed seeds; and its filters.
#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "snapmla/error.h"

namespace snapmla::engine {
namespace {

struct Setting {
  float temperature, top_p, min_p;
  int top_k;
};

// The distribution restated: tempered softmax; min_p against the best; then the k best; then the
// smallest set of probability top_p.
std::map<int, double> expected(const std::vector<float>& logits, const Setting& s) {
  std::vector<std::pair<double, int>> p;
  const double top = *std::max_element(logits.begin(), logits.end());
  for (std::size_t i = 0; i < logits.size(); ++i)
    p.emplace_back(std::exp((logits[i] - top) / s.temperature), static_cast<int>(i));
  std::erase_if(p, [&](const auto& x) { return x.first < s.min_p; });
  std::sort(p.begin(), p.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  if (s.top_k > 0 && p.size() > static_cast<std::size_t>(s.top_k))
    p.resize(static_cast<std::size_t>(s.top_k));
  double total = 0, kept = 0;
  for (const auto& x : p) total += x.first;
  std::map<int, double> result;
  for (const auto& x : p) {
    if (s.top_p < 1 && kept >= s.top_p * total) break;
    kept += x.first;
    result[x.second] = x.first;
  }
  for (auto& [id, value] : result) value /= kept;
  return result;
}

class SamplerStatistics : public testing::TestWithParam<int> {};

TEST_P(SamplerStatistics, ChiSquareFitsTheDistribution) {
  const Setting settings[] = {{1.0f, 1.0f, 0.0f, 0},  {0.7f, 1.0f, 0.0f, 0}, {2.0f, 1.0f, 0.0f, 0},
                              {1.0f, 0.9f, 0.0f, 0},  {1.0f, 0.5f, 0.0f, 0}, {1.0f, 1.0f, 0.1f, 0},
                              {1.0f, 1.0f, 0.0f, 5},  {1.5f, 0.8f, 0.0f, 6}, {1.2f, 0.9f, 0.05f, 8},
                              {0.5f, 0.95f, 0.02f, 0}};
  const Setting& s = settings[GetParam() % 10];
  const auto seed = static_cast<std::uint64_t>(GetParam() / 10);
  std::vector<float> logits;
  for (int i = 0; i < 12; ++i)
    logits.push_back(1.7f * std::sin(static_cast<float>(i * i + GetParam())));
  SamplingParams params;
  params.temperature = s.temperature;
  params.top_p = s.top_p;
  params.min_p = s.min_p;
  params.top_k = s.top_k;
  params.seed = 1000 + seed;
  Sampler sampler(params);
  const int draws = 20000;
  std::map<int, int> seen;
  for (int i = 0; i < draws; ++i) ++seen[sampler.sample(logits)];
  const auto want = expected(logits, s);
  double chi = 0;
  for (const auto& [id, p] : want) chi += std::pow(seen[id] - draws * p, 2) / (draws * p);
  for (const auto& [id, count] : seen)
    EXPECT_TRUE(want.contains(id)) << "token " << id << ", " << count;
  // Mean k, variance 2 k: five standard deviations, and a little for small k.
  const double k = static_cast<double>(want.size()) - 1;
  EXPECT_LT(chi, k + 5 * std::sqrt(2 * k) + 6);
}

INSTANTIATE_TEST_SUITE_P(Settings, SamplerStatistics, testing::Range(0, 50));

TEST(SamplerDraws, RepeatWithTheSeedAndDifferWithout) {
  const std::vector<float> logits(64, 0.0f);
  SamplingParams params;
  params.temperature = 1;
  const auto draw = [&](std::uint64_t seed) {
    params.seed = seed;
    Sampler sampler(params);
    std::vector<int> ids;
    for (int i = 0; i < 40; ++i) ids.push_back(sampler.sample(logits));
    return ids;
  };
  EXPECT_EQ(draw(3), draw(3));
  EXPECT_NE(draw(3), draw(4));
  EXPECT_NE(draw(0), draw(1));
}

// Successive draws are independent: pairs fill the square evenly.
TEST(SamplerDraws, PairsAreIndependent) {
  const std::vector<float> logits(4, 1.0f);
  SamplingParams params;
  params.temperature = 1;
  params.seed = 99;
  Sampler sampler(params);
  int seen[4][4] = {}, last = sampler.sample(logits);
  for (int i = 0; i < 32000; ++i) {
    const int next = sampler.sample(logits);
    ++seen[last][next];
    last = next;
  }
  double chi = 0;
  for (const auto& row : seen)
    for (int count : row) chi += std::pow(count - 2000.0, 2) / 2000;
  EXPECT_LT(chi, 15 + 5 * std::sqrt(30.0));
}

TEST(SamplerDraws, ExtremeTemperaturesStayFinite) {
  SamplingParams params;
  params.temperature = 1e-30f;
  EXPECT_EQ(Sampler(params).sample(std::vector<float>{1, 3, 2}), 1);
  params.temperature = 1e30f;
  Sampler hot(params);
  int seen[3] = {};
  for (int i = 0; i < 3000; ++i) ++seen[hot.sample(std::vector<float>{-80, 3, 80})];
  for (int count : seen) EXPECT_GT(count, 800);
  params.temperature = 1;
  EXPECT_EQ(Sampler(params).sample(std::vector<float>{-INFINITY, -INFINITY, -1e30f}), 2);
  EXPECT_EQ(Sampler(params).sample(std::vector<float>{1, INFINITY, 2}), 1);
}

TEST(SamplerParams, AreCheckedByName) {
  const auto refused = [](const char* name, auto change) {
    SamplingParams params;
    change(params);
    try {
      Sampler sampler(params);
      ADD_FAILURE() << "accepted, expected a refusal of " << name;
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()).rfind(name, 0), 0u) << e.what();
    }
  };
  for (float bad : {-0.1f, NAN, INFINITY})
    refused("temperature", [&](auto& p) { p.temperature = bad; });
  for (float bad : {0.0f, -1.0f, 1.1f, NAN}) refused("top_p", [&](auto& p) { p.top_p = bad; });
  for (float bad : {-0.1f, 1.0f, NAN}) refused("min_p", [&](auto& p) { p.min_p = bad; });
  refused("top_k", [](auto& p) { p.top_k = -1; });
}

}  // namespace
}  // namespace snapmla::engine
