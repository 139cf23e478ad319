#include "ops/route.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace snapmla::ops {
namespace {

constexpr float kDropped = -std::numeric_limits<float>::infinity();

std::vector<float> scores(const MoeRouteArgs& a, const float* logits) {
  const std::size_t experts = static_cast<std::size_t>(a.logits.dim(1));
  std::vector<float> p(experts);
  if (a.kind == RouterKind::kNoAuxTcSigmoid) {
    for (std::size_t e = 0; e < experts; ++e) {
      p[e] = static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(logits[e]))));
    }
    return p;
  }
  const double top = *std::max_element(logits, logits + experts);
  double sum = 0;
  for (std::size_t e = 0; e < experts; ++e) sum += std::exp(logits[e] - top);
  for (std::size_t e = 0; e < experts; ++e)
    p[e] = static_cast<float>(std::exp(logits[e] - top) / sum);
  return p;
}

// The indices of the `count` largest values, largest first, ties to the lowest index.
std::vector<std::int32_t> top(const std::vector<float>& values, int count) {
  std::vector<std::int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t i, std::int32_t j) {
    return values[static_cast<std::size_t>(i)] > values[static_cast<std::size_t>(j)];
  });
  order.resize(static_cast<std::size_t>(count));
  return order;
}

void drop_groups(const MoeRouteArgs& a, std::vector<float>& choice) {
  const auto size = static_cast<std::ptrdiff_t>(choice.size()) / a.num_groups;
  std::vector<float> rank;
  for (int g = 0; g < a.num_groups; ++g) {
    std::vector<float> members(choice.begin() + g * size, choice.begin() + (g + 1) * size);
    std::sort(members.begin(), members.end(), std::greater<>());
    const bool two = a.kind == RouterKind::kNoAuxTcSigmoid && members.size() > 1;
    rank.push_back(two ? members[0] + members[1] : members[0]);
  }
  const std::vector<std::int32_t> kept = top(rank, a.groups_kept);
  for (int g = 0; g < a.num_groups; ++g) {
    if (std::find(kept.begin(), kept.end(), g) != kept.end()) continue;
    std::fill_n(choice.begin() + g * size, size, kDropped);
  }
}

}  // namespace

void route(const MoeRouteArgs& a) {
  for (std::int64_t t = 0; t < a.logits.dim(0); ++t) {
    const std::vector<float> p = scores(a, a.logits.row<float>(t));
    std::vector<float> choice = p;
    if (a.bias.raw()) {
      for (std::size_t e = 0; e < choice.size(); ++e) choice[e] += a.bias.data<float>()[e];
    }
    if (a.kind != RouterKind::kGreedySoftmax && a.num_groups > 1) drop_groups(a, choice);
    const std::vector<std::int32_t> ids = top(choice, a.top_k);
    double sum = 1e-20;
    for (std::int32_t id : ids) sum += p[static_cast<std::size_t>(id)];
    for (std::size_t k = 0; k < ids.size(); ++k) {
      const double weight = p[static_cast<std::size_t>(ids[k])] / (a.normalize ? sum : 1.0);
      a.ids.row<std::int32_t>(t)[k] = ids[k];
      a.weights.row<float>(t)[k] = static_cast<float>(weight * a.scaling_factor);
    }
  }
}

}  // namespace snapmla::ops
