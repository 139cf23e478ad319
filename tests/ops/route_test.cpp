// The three routing rules against a plain restatement in double, over a table of shapes; then the
// cases that a table of random numbers does not hold: ties, a bias that must not reach the weights,
// groups ranked by their two best, dropped groups, renormalisation.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "backends/cpu/cpu_backend.h"
#include "backends/ref/ref_backend.h"
#include "ops/ops.h"

namespace snapmla {
namespace {

using ops::RouterKind;

struct Rule {
  RouterKind kind = RouterKind::kNoAuxTcSigmoid;
  int experts = 8, groups = 1, kept = 1, top_k = 2;
  bool normalize = false;
  float factor = 1.0f;
  bool bias = false;
};

struct Choice {
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
};

Choice route(const Rule& r, const std::vector<float>& logits, const std::vector<float>& bias,
             ops::OpSet& backend) {
  const auto tokens = static_cast<std::int64_t>(logits.size()) / r.experts;
  Choice c;
  c.ids.assign(static_cast<std::size_t>(tokens * r.top_k), -7);
  c.weights.assign(c.ids.size(), std::nanf(""));
  ops::MoeRouteArgs a;
  a.logits = TensorView::of(logits.data(), {tokens, r.experts});
  if (!bias.empty()) a.bias = TensorView::of(bias.data(), {r.experts});
  a.kind = r.kind;
  a.num_groups = r.groups;
  a.groups_kept = r.kept;
  a.top_k = r.top_k;
  a.normalize = r.normalize;
  a.scaling_factor = r.factor;
  a.ids = TensorView::of(c.ids.data(), {tokens, r.top_k});
  a.weights = TensorView::of(c.weights.data(), {tokens, r.top_k});
  ops::moe_route(backend, a);
  return c;
}

ops::OpSet& ref_ops() {
  static const auto ops = ref::make_ref_backend();
  return *ops;
}

// Expected experts by repeatedly looking for the best, group by group.
Choice restated(const Rule& r, const std::vector<float>& logits, const std::vector<float>& bias) {
  Choice c;
  const auto experts = static_cast<std::size_t>(r.experts);
  for (std::size_t first = 0; first < logits.size(); first += experts) {
    std::vector<double> score(experts), choice;
    double sum = 0;
    for (std::size_t e = 0; e < experts; ++e) sum += std::exp(logits[first + e]);
    for (std::size_t e = 0; e < experts; ++e) {
      const double x = std::exp(logits[first + e]);
      score[e] = r.kind == RouterKind::kNoAuxTcSigmoid ? x / (1 + x) : x / sum;
    }
    choice = score;
    for (std::size_t e = 0; e < bias.size(); ++e) choice[e] += bias[e];
    if (r.kind != RouterKind::kGreedySoftmax) {
      const std::size_t size = experts / static_cast<std::size_t>(r.groups);
      std::vector<double> rank;
      for (std::size_t g = 0; g < experts; g += size) {
        std::vector<double> m(choice.begin() + static_cast<std::ptrdiff_t>(g),
                              choice.begin() + static_cast<std::ptrdiff_t>(g + size));
        std::sort(m.rbegin(), m.rend());
        rank.push_back(m[0] + (r.kind == RouterKind::kNoAuxTcSigmoid && size > 1 ? m[1] : 0));
      }
      for (std::size_t g = 0; g < rank.size(); ++g) {
        const auto better =
            std::count_if(rank.begin(), rank.end(), [&](double x) { return x > rank[g]; });
        if (better < r.kept) continue;
        std::fill_n(choice.begin() + static_cast<std::ptrdiff_t>(g * size), size, -INFINITY);
      }
    }
    double total = 0;
    const std::size_t start = c.ids.size();
    for (int k = 0; k < r.top_k; ++k) {
      const auto best = std::max_element(choice.begin(), choice.end()) - choice.begin();
      c.ids.push_back(static_cast<std::int32_t>(best));
      c.weights.push_back(static_cast<float>(score[static_cast<std::size_t>(best)]));
      total += score[static_cast<std::size_t>(best)];
      choice[static_cast<std::size_t>(best)] = -INFINITY;
    }
    for (std::size_t k = start; k < c.ids.size(); ++k)
      c.weights[k] = static_cast<float>(c.weights[k] * r.factor / (r.normalize ? total : 1));
  }
  return c;
}

class Router : public testing::TestWithParam<int> {};

TEST_P(Router, EqualsTheRuleRestated) {
  std::mt19937 rng(static_cast<unsigned>(GetParam()));
  const RouterKind kinds[] = {RouterKind::kGreedySoftmax, RouterKind::kGroupLimitedGreedySoftmax,
                              RouterKind::kNoAuxTcSigmoid};
  Rule r;
  r.kind = kinds[GetParam() % 3];
  r.groups = r.kind == RouterKind::kGreedySoftmax ? 1 : 1 << (rng() % 4);
  r.experts = r.groups * static_cast<int>(1 + rng() % 32);
  r.kept = 1 + static_cast<int>(rng() % static_cast<unsigned>(r.groups));
  const int open = r.experts / r.groups * r.kept;
  r.top_k = 1 + static_cast<int>(rng() % static_cast<unsigned>(std::min(open, 8)));
  r.normalize = rng() % 2 == 0;
  r.factor = rng() % 2 ? 2.5f : 16.0f;
  r.bias = r.kind == RouterKind::kNoAuxTcSigmoid && rng() % 2;
  std::normal_distribution<float> normal;
  std::vector<float> logits(static_cast<std::size_t>(5 * r.experts)), bias;
  for (float& x : logits) x = 2 * normal(rng);
  if (r.bias)
    for (int e = 0; e < r.experts; ++e) bias.push_back(0.2f * normal(rng));
  const Choice want = restated(r, logits, bias), got = route(r, logits, bias, ref_ops());
  EXPECT_EQ(got.ids, want.ids);
  for (std::size_t i = 0; i < want.weights.size(); ++i)
    EXPECT_NEAR(got.weights[i] / want.weights[i], 1, 2e-6);
  const auto cpu = cpu::make_cpu_backend(2);
  const Choice same = route(r, logits, bias, *cpu);
  EXPECT_EQ(same.ids, got.ids);
  EXPECT_EQ(same.weights, got.weights);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Router, testing::Range(0, 600));

TEST(RouterCases, TiesGoToTheLowestIndex) {
  for (RouterKind kind : {RouterKind::kGreedySoftmax, RouterKind::kGroupLimitedGreedySoftmax,
                          RouterKind::kNoAuxTcSigmoid}) {
    Rule r;
    r.kind = kind;
    r.top_k = 3;
    EXPECT_EQ(route(r, std::vector<float>(8, 0.5f), {}, ref_ops()).ids,
              (std::vector<std::int32_t>{0, 1, 2}));
    EXPECT_EQ(route(r, {0, 3, 1, 3, 3, 1, 0, 3}, {}, ref_ops()).ids,
              (std::vector<std::int32_t>{1, 3, 4}));
  }
}

TEST(RouterCases, TiedGroupsKeepTheLowest) {
  Rule r;
  r.kind = RouterKind::kGroupLimitedGreedySoftmax;
  r.groups = 4;
  r.kept = 2;
  EXPECT_EQ(route(r, {1, 0, 1, 0, 1, 0, 1, 0}, {}, ref_ops()).ids,
            (std::vector<std::int32_t>{0, 2}));
}

TEST(RouterCases, BiasChoosesButDoesNotWeigh) {
  Rule r;
  r.top_k = 1;
  r.experts = 3;
  const Choice c = route(r, {0.0f, 1.0f, -1.0f}, {0.0f, 0.0f, 2.0f}, ref_ops());
  EXPECT_EQ(c.ids[0], 2);
  EXPECT_FLOAT_EQ(c.weights[0], static_cast<float>(1 / (1 + std::exp(1.0))));
}

// A group with the best expert loses to one with two good ones, unless the rule is the maximum.
TEST(RouterCases, GroupsAreRankedByTheirTwoBestOrByTheBest) {
  const std::vector<float> logits = {3, -9, 1, 1};
  Rule r;
  r.experts = 4;
  r.groups = 2;
  r.top_k = 1;
  EXPECT_EQ(route(r, logits, {}, ref_ops()).ids[0], 2);
  r.kind = RouterKind::kGroupLimitedGreedySoftmax;
  EXPECT_EQ(route(r, logits, {}, ref_ops()).ids[0], 0);
}

// The bias counts in the ranking of groups too.
TEST(RouterCases, BiasRanksGroups) {
  Rule r;
  r.experts = 4;
  r.groups = 2;
  r.top_k = 1;
  EXPECT_EQ(route(r, {1, 1, 0, 0}, {0, 0, 1, 1}, ref_ops()).ids[0], 2);
}

// All choices of the kept groups are negative: a dropped group must not come back at zero.
TEST(RouterCases, DroppedGroupsNeverReturn) {
  Rule r;
  r.experts = 4;
  r.groups = 2;
  const Choice c = route(r, {0, 0, -1, -1}, {-5, -5, -5, -5}, ref_ops());
  EXPECT_EQ(c.ids, (std::vector<std::int32_t>{0, 1}));
}

TEST(RouterCases, NormaliseAndScale) {
  Rule r;
  r.normalize = true;
  r.factor = 2.5f;
  r.top_k = 3;
  const Choice c = route(r, {2, 1, 0, -1, -2, -3, -4, -5}, {}, ref_ops());
  EXPECT_NEAR(std::accumulate(c.weights.begin(), c.weights.end(), 0.0), 2.5, 1e-6);
  EXPECT_GT(c.weights[0], c.weights[1]);
  r.normalize = false;
  EXPECT_NEAR(route(r, {2, 1, 0, -1, -2, -3, -4, -5}, {}, ref_ops()).weights[0],
              2.5 / (1 + std::exp(-2.0)), 1e-6);
}

TEST(RouterCases, LargeLogitsStayFinite) {
  Rule r;
  r.kind = RouterKind::kGreedySoftmax;
  const Choice c = route(r, {3e4f, 2e4f, -3e4f, 0, 0, 0, 0, 0}, {}, ref_ops());
  EXPECT_EQ(c.ids[0], 0);
  EXPECT_EQ(c.weights[0], 1.0f);
  EXPECT_EQ(c.weights[1], 0.0f);
}

}  // namespace
}  // namespace snapmla
