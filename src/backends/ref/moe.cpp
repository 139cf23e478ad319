// Mixture of experts: the three routing rules and the routed sum.
//
//   greedy softmax         p = softmax(logits); top-k of p
//   group-limited greedy   groups ranked by their MAXIMUM p; top-k of p inside the kept groups
//   noaux_tc sigmoid       p = sigmoid(logits), choice by p + bias; groups ranked by the SUM OF
//   THEIR TWO LARGEST;
//                          the weights are p WITHOUT bias
//   weights: optionally p / (sum + 1e-20), then times routed_scaling_factor
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "backends/ref/ref_ops.h"
#include "ops/element.h"

namespace snapmla::ref {
namespace {

constexpr float kDropped = -std::numeric_limits<float>::infinity();

std::vector<float> scores(const ops::MoeRouteArgs& a, const float* logits) {
  const std::size_t experts = static_cast<std::size_t>(a.logits.dim(1));
  std::vector<float> p(experts);
  if (a.kind == ops::RouterKind::kNoAuxTcSigmoid) {
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

void drop_groups(const ops::MoeRouteArgs& a, std::vector<float>& choice) {
  const auto size = static_cast<std::ptrdiff_t>(choice.size()) / a.num_groups;
  std::vector<float> rank;
  for (int g = 0; g < a.num_groups; ++g) {
    std::vector<float> members(choice.begin() + g * size, choice.begin() + (g + 1) * size);
    std::sort(members.begin(), members.end(), std::greater<>());
    const bool two = a.kind == ops::RouterKind::kNoAuxTcSigmoid && members.size() > 1;
    rank.push_back(two ? members[0] + members[1] : members[0]);
  }
  const std::vector<std::int32_t> kept = top(rank, a.groups_kept);
  for (int g = 0; g < a.num_groups; ++g) {
    if (std::find(kept.begin(), kept.end(), g) != kept.end()) continue;
    std::fill_n(choice.begin() + g * size, size, kDropped);
  }
}

}  // namespace

void moe_route(const ops::MoeRouteArgs& a) {
  for (std::int64_t t = 0; t < a.logits.dim(0); ++t) {
    const std::vector<float> p = scores(a, a.logits.row<float>(t));
    std::vector<float> choice = p;
    if (a.bias.raw()) {
      for (std::size_t e = 0; e < choice.size(); ++e) choice[e] += a.bias.data<float>()[e];
    }
    if (a.kind != ops::RouterKind::kGreedySoftmax && a.num_groups > 1) drop_groups(a, choice);
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

void moe_ffn(const ops::MoeFfnArgs& a) {
  const std::int64_t width = a.x.dim(1);
  std::vector<float> gate, up, out(static_cast<std::size_t>(width));
  for (std::int64_t t = 0; t < a.x.dim(0); ++t) {
    for (std::int64_t k = 0; k < a.ids.dim(1); ++k) {
      const ops::ExpertWeights& e =
          (*a.experts)[static_cast<std::size_t>(a.ids.row<std::int32_t>(t)[k])];
      const std::int64_t inner = e.gate.out_features();
      gate.resize(static_cast<std::size_t>(inner));
      up.resize(static_cast<std::size_t>(inner));
      const TensorView x = TensorView::of(a.x.row<float>(t), {1, width});
      const TensorView g = TensorView::of(gate.data(), {1, inner}),
                       u = TensorView::of(up.data(), {1, inner});
      linear({x, e.gate, g});
      linear({x, e.up, u});
      swiglu({g, u, g});
      linear({g, e.down, TensorView::of(out.data(), {1, width})});
      for (std::int64_t d = 0; d < width; ++d) {
        a.out.row<float>(t)[d] += a.weights.row<float>(t)[k] * out[static_cast<std::size_t>(d)];
      }
    }
  }
}

}  // namespace snapmla::ref
