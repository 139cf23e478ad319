#include "ops/ops.h"

#include <cmath>
#include <utility>

#include "ops/validate.h"

namespace snapmla::ops {
namespace {

constexpr std::initializer_list<DType> kF32Only = {DType::kF32};
constexpr std::initializer_list<DType> kF32OrBf16 = {DType::kF32, DType::kBF16};

void check_weight(const char* name, const Weight& w, std::int64_t out = kAny,
                  std::int64_t in = kAny) {
  check_tensor(name, w.data, {out, in}, {DType::kF32, DType::kBF16, DType::kE4M3});
  if (w.data.dtype() == DType::kE4M3) {
    check_tensor("weight_scale_inv", w.scale_inv,
                 {(w.out_features() + 127) / 128, (w.in_features() + 127) / 128}, kF32Only);
  }
}

bool readable(OpSet& ops) { return ops.memory().host_accessible(); }

}  // namespace

void embed(OpSet& ops, const EmbedArgs& a) {
  check_tensor("ids", a.ids, {kAny}, {DType::kI32});
  check_tensor("table", a.table, {kAny, kAny}, kF32OrBf16);
  check_output("out", a.out, {a.ids.dim(0), a.table.dim(1)}, kF32Only);
  check_no_overlap("out", a.out, "ids", a.ids);
  check_no_overlap("out", a.out, "table", a.table);
  for (std::int64_t i = 0; readable(ops) && i < a.ids.dim(0); ++i) {
    const std::int32_t id = a.ids.data<std::int32_t>()[i];
    if (id < 0 || id >= a.table.dim(0)) {
      refuse("ids", str("token id ", id, " at ", i), str("0 to ", a.table.dim(0) - 1));
    }
  }
  if (a.ids.dim(0) > 0) ops.embed(a);
}

void linear(OpSet& ops, const LinearArgs& a) {
  check_weight("weight", a.weight);
  check_tensor("x", a.x, {kAny, a.weight.in_features()}, kF32Only);
  check_output("out", a.out, {a.x.dim(0), a.weight.out_features()}, kF32Only);
  check_no_overlap("out", a.out, "x", a.x);
  if (a.x.dim(0) > 0) ops.linear(a);
}

void head_linear(OpSet& ops, const HeadLinearArgs& a) {
  check_tensor("weight", a.weight, {kAny, kAny, kAny}, kF32OrBf16);
  check_tensor("x", a.x, {kAny, a.weight.dim(0), a.weight.dim(2)}, kF32Only);
  check_output("out", a.out, {a.x.dim(0), a.weight.dim(0), a.weight.dim(1)}, kF32Only);
  check_no_overlap("out", a.out, "x", a.x);
  if (a.x.dim(0) > 0) ops.head_linear(a);
}

void rms_norm(OpSet& ops, const RmsNormArgs& a) {
  check_tensor("x", a.x, {kAny, kAny}, kF32Only);
  check_tensor("weight", a.weight, {a.x.dim(1)}, kF32OrBf16);
  check_output("out", a.out, {a.x.dim(0), a.x.dim(1)}, kF32Only);
  require(a.eps > 0 && std::isfinite(a.eps), "eps", a.eps, "a number > 0");
  check_same_or_apart("out", a.out, "x", a.x);
  check_no_overlap("out", a.out, "weight", a.weight);
  if (a.x.dim(0) > 0) ops.rms_norm(a);
}

void rope(OpSet& ops, const RopeArgs& a) {
  check_output("x", a.x, {kAny, kAny, kAny}, kF32Only);
  check_tensor("positions", a.positions, {a.x.dim(0)}, {DType::kI32});
  check_tensor("cos_sin", a.cos_sin, {kAny, a.x.dim(2)}, kF32Only);
  require(a.x.dim(2) % 2 == 0, "x width", a.x.dim(2), "an even number");
  check_no_overlap("x", a.x, "positions", a.positions);
  check_no_overlap("x", a.x, "cos_sin", a.cos_sin);
  for (std::int64_t i = 0; readable(ops) && i < a.positions.dim(0); ++i) {
    const std::int32_t p = a.positions.data<std::int32_t>()[i];
    if (p < 0 || p >= a.cos_sin.dim(0))
      refuse("positions", str(p), str("0 to ", a.cos_sin.dim(0) - 1));
  }
  if (a.x.dim(0) > 0) ops.rope(a);
}

void swiglu(OpSet& ops, const SwigluArgs& a) {
  check_tensor("gate", a.gate, {kAny, kAny}, kF32Only);
  check_tensor("up", a.up, {a.gate.dim(0), a.gate.dim(1)}, kF32Only);
  check_output("out", a.out, {a.gate.dim(0), a.gate.dim(1)}, kF32Only);
  check_same_or_apart("out", a.out, "gate", a.gate);
  check_same_or_apart("out", a.out, "up", a.up);
  if (a.gate.dim(0) > 0) ops.swiglu(a);
}

void copy_rows(OpSet& ops, const CopyRowsArgs& a) {
  check_tensor("x", a.x, {kAny, kAny}, kF32Only);
  check_output("out", a.out, {a.x.dim(0), a.x.dim(1)}, kF32OrBf16);
  check_no_overlap("out", a.out, "x", a.x);
  if (a.x.dim(0) > 0) ops.copy_rows(a);
}

void add(OpSet& ops, const TensorView& x, const TensorView& y) {
  check_tensor("x", x, {kAny, kAny}, kF32Only);
  check_output("y", y, {x.dim(0), x.dim(1)}, kF32Only);
  check_same_or_apart("y", y, "x", x);
  if (x.dim(0) > 0) ops.add(x, y);
}

void moe_route(OpSet& ops, const MoeRouteArgs& a) {
  check_tensor("logits", a.logits, {kAny, kAny}, kF32Only);
  const std::int64_t experts = a.logits.dim(1);
  if (a.bias.raw()) check_tensor("bias", a.bias, {experts}, kF32Only);
  require(a.num_groups >= 1 && experts % a.num_groups == 0, "num_groups", a.num_groups,
          "a divisor of the number of experts");
  require(a.groups_kept >= 1 && a.groups_kept <= a.num_groups, "groups_kept", a.groups_kept,
          "1 to num_groups");
  require(a.top_k >= 1 && a.top_k <= experts / a.num_groups * a.groups_kept, "top_k", a.top_k,
          "1 to the number of experts in the kept groups");
  require(std::isfinite(a.scaling_factor), "scaling_factor", a.scaling_factor, "a finite number");
  check_output("ids", a.ids, {a.logits.dim(0), a.top_k}, {DType::kI32});
  check_output("weights", a.weights, {a.logits.dim(0), a.top_k}, kF32Only);
  check_no_overlap("weights", a.weights, "ids", a.ids);
  for (const auto& [name, out] : {std::pair("ids", a.ids), std::pair("weights", a.weights)}) {
    check_no_overlap(name, out, "logits", a.logits);
    if (a.bias.raw()) check_no_overlap(name, out, "bias", a.bias);
  }
  if (a.logits.dim(0) > 0) ops.moe_route(a);
}

void moe_ffn(OpSet& ops, const MoeFfnArgs& a) {
  check_tensor("x", a.x, {kAny, kAny}, kF32Only);
  check_tensor("ids", a.ids, {a.x.dim(0), kAny}, {DType::kI32});
  check_tensor("weights", a.weights, {a.x.dim(0), a.ids.dim(1)}, kF32Only);
  check_output("out", a.out, {a.x.dim(0), a.x.dim(1)}, kF32Only);
  if (a.experts == nullptr || a.experts->empty()) refuse("experts", "none", "at least one");
  check_no_overlap("out", a.out, "x", a.x);
  check_no_overlap("out", a.out, "ids", a.ids);
  check_no_overlap("out", a.out, "weights", a.weights);
  for (const ExpertWeights& e : *a.experts) {
    const std::int64_t width = a.x.dim(1), inner = e.gate.out_features();
    check_weight("gate weight", e.gate, inner, width);
    check_weight("up weight", e.up, inner, width);
    check_weight("down weight", e.down, width, inner);
  }
  const auto count = static_cast<std::int64_t>(a.experts->size());
  for (std::int64_t t = 0; readable(ops) && t < a.x.dim(0); ++t) {
    for (std::int64_t k = 0; k < a.ids.dim(1); ++k) {
      const std::int32_t id = a.ids.row<std::int32_t>(t)[k];
      if (id < 0 || id >= count) refuse("ids", str("expert ", id), str("0 to ", count - 1));
    }
  }
  if (a.x.dim(0) > 0) ops.moe_ffn(a);
}

void mla_prefill(OpSet& ops, const MlaPrefillArgs& a) {
  check_tensor("q", a.q, {kAny, kAny, kAny}, kF32Only);
  check_tensor("k_nope", a.k_nope, {kAny, a.q.dim(1), kAny}, kF32Only);
  const std::int64_t keys = a.k_nope.dim(0);
  require(a.k_nope.dim(2) <= a.q.dim(2), "k_nope width", a.k_nope.dim(2), "at most the width of q");
  check_tensor("k_rope", a.k_rope, {keys, a.q.dim(2) - a.k_nope.dim(2)}, kF32Only);
  check_tensor("v", a.v, {keys, a.q.dim(1), kAny}, kF32Only);
  check_output("out", a.out, {a.q.dim(0), a.q.dim(1), a.v.dim(2)}, kF32Only);
  require(a.query_begin >= 0 && a.query_begin <= keys - a.q.dim(0), "query_begin", a.query_begin,
          "a position such that every query has its own key");
  require(std::isfinite(a.softmax_scale) && a.softmax_scale > 0, "softmax_scale", a.softmax_scale,
          "a finite number > 0");
  check_no_overlap("out", a.out, "q", a.q);
  check_no_overlap("out", a.out, "k_nope", a.k_nope);
  check_no_overlap("out", a.out, "k_rope", a.k_rope);
  check_no_overlap("out", a.out, "v", a.v);
  if (a.q.dim(0) > 0) ops.mla_prefill(a);
}

}  // namespace snapmla::ops
