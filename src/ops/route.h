// The router of a mixture of experts: three rules, shared by the host backends.
//
//   greedy softmax         p = softmax(logits); top-k of p
//   group-limited greedy   groups ranked by their MAXIMUM p; top-k of p inside the kept groups
//   noaux_tc sigmoid       p = sigmoid(logits), choice by p + bias; groups ranked by the SUM OF
//   THEIR TWO LARGEST;
//                          the weights are p WITHOUT bias
//   weights: optionally p / (sum + 1e-20), then times routed_scaling_factor
#pragma once

#include "ops/op_set.h"

namespace snapmla::ops {

// Dropped groups count as -inf; ties go to the lowest index.
void route(const MoeRouteArgs& args);

}  // namespace snapmla::ops
