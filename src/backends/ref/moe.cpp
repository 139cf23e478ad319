// Mixture of experts: the routed sum.
#include <vector>

#include "backends/ref/ref_ops.h"
#include "ops/route.h"

namespace snapmla::ref {

void moe_route(const ops::MoeRouteArgs& a) { ops::route(a); }

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
