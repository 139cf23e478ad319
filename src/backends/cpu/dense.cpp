// Linear layers and the small per-token operations.
//
// linear: a thread takes a strip of output features, decodes each weight row to f32 once and
// multiplies it with every token: a single token is bound by reading the weights, many tokens reuse
// the decoded row.
#include <algorithm>
#include <cmath>
#include <vector>

#include "backends/cpu/cpu_ops.h"
#include "backends/cpu/kernels.h"
#include "ops/element.h"
#include "ops/route.h"

namespace snapmla::cpu {
namespace {

constexpr std::int64_t kStrip = 16;  // output features per work item

void decode_row(const ops::Weight& w, std::int64_t row, float* to) {
  const std::int64_t k = w.in_features();
  const std::int64_t at = row * w.data.stride(0);
  if (w.data.dtype() == DType::kBF16) {
    decode_bf16(w.data.data<BFloat16>() + at, to, k);
  } else {
    const float* scales = w.scale_inv.row<float>(row / 128);
    for (std::int64_t block = 0; block * 128 < k; ++block) {
      const std::int64_t begin = block * 128;
      decode_e4m3(w.data.data<Float8E4M3>() + at + begin, scales[block], to + begin,
                  std::min<std::int64_t>(128, k - begin));
    }
  }
}

}  // namespace

void linear(ThreadPool& pool, const ops::LinearArgs& a) {
  const std::int64_t tokens = a.x.dim(0), k = a.weight.in_features(),
                     features = a.weight.out_features();
  pool.parallel_for((features + kStrip - 1) / kStrip, [&](std::int64_t strip) {
    thread_local std::vector<float> row, sums;
    row.resize(static_cast<std::size_t>(k));
    sums.resize(static_cast<std::size_t>(tokens));
    for (std::int64_t n = strip * kStrip; n < std::min(features, (strip + 1) * kStrip); ++n) {
      const float* w =
          a.weight.data.dtype() == DType::kF32 ? a.weight.data.row<float>(n) : row.data();
      if (w == row.data()) decode_row(a.weight, n, row.data());
      dot_tokens(a.x.row<float>(0), a.x.stride(0), w, k, tokens, sums.data());
      for (std::int64_t t = 0; t < tokens; ++t)
        a.out.row<float>(t)[n] = sums[static_cast<std::size_t>(t)];
    }
  });
}

void head_linear(ThreadPool& pool, const ops::HeadLinearArgs& a) {
  const std::int64_t heads = a.weight.dim(0), features = a.weight.dim(1), k = a.weight.dim(2);
  pool.parallel_for(heads, [&](std::int64_t h) {
    thread_local std::vector<float> decoded;
    const float* w = a.weight.dtype() == DType::kF32 ? a.weight.row<float>(h) : nullptr;
    std::int64_t stride = a.weight.stride(1);
    if (!w) {
      decoded.resize(static_cast<std::size_t>(features * k));
      for (std::int64_t n = 0; n < features; ++n)
        decode_bf16(a.weight.row<BFloat16>(h, n), decoded.data() + n * k, k);
      w = decoded.data();
      stride = k;
    }
    for (std::int64_t t = 0; t < a.x.dim(0); ++t) {
      dot_rows(a.x.row<float>(t, h), w, stride, k, features, a.out.row<float>(t, h));
    }
  });
}

void embed(ThreadPool& pool, const ops::EmbedArgs& a) {
  pool.parallel_for(a.ids.dim(0), [&](std::int64_t t) {
    const std::int64_t row = a.ids.data<std::int32_t>()[t] * a.table.stride(0);
    for (std::int64_t d = 0; d < a.table.dim(1); ++d) {
      a.out.row<float>(t)[d] = ops::load(a.table.raw(), a.table.dtype(), row + d);
    }
  });
}

void rms_norm(ThreadPool& pool, const ops::RmsNormArgs& a) {
  const std::int64_t width = a.x.dim(1);
  pool.parallel_for(a.x.dim(0), [&](std::int64_t t) {
    const float* x = a.x.row<float>(t);
    double squares = 0;
    for (std::int64_t d = 0; d < width; ++d) squares += static_cast<double>(x[d]) * x[d];
    const auto inverse =
        static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(width) + a.eps));
    for (std::int64_t d = 0; d < width; ++d) {
      a.out.row<float>(t)[d] = ops::load(a.weight.raw(), a.weight.dtype(), d) * (x[d] * inverse);
    }
  });
}

void rope(ThreadPool& pool, const ops::RopeArgs& a) {
  const std::int64_t half = a.x.dim(2) / 2;
  pool.parallel_for(a.x.dim(0), [&](std::int64_t t) {
    const float* table = a.cos_sin.row<float>(a.positions.data<std::int32_t>()[t]);
    for (std::int64_t h = 0; h < a.x.dim(1); ++h) {
      float* x = a.x.row<float>(t, h);
      for (std::int64_t j = 0; j < half; ++j) {
        float& first = a.interleaved ? x[2 * j] : x[j];
        float& second = a.interleaved ? x[2 * j + 1] : x[j + half];
        const float c = table[2 * j], s = table[2 * j + 1], p = first, q = second;
        first = p * c - q * s;
        second = p * s + q * c;
      }
      if (a.interleaved || !a.to_interleaved) continue;
      thread_local std::vector<float> halves;
      halves.assign(x, x + 2 * half);
      for (std::int64_t j = 0; j < half; ++j) {
        x[2 * j] = halves[static_cast<std::size_t>(j)];
        x[2 * j + 1] = halves[static_cast<std::size_t>(j + half)];
      }
    }
  });
}

void swiglu(ThreadPool& pool, const ops::SwigluArgs& a) {
  pool.parallel_for(a.gate.dim(0), [&](std::int64_t t) {
    const float *gate = a.gate.row<float>(t), *up = a.up.row<float>(t);
    float* out = a.out.row<float>(t);
    for (std::int64_t d = 0; d < a.gate.dim(1); ++d)
      out[d] = gate[d] / (1.0f + std::exp(-gate[d])) * up[d];
  });
}

void copy_rows(const ops::CopyRowsArgs& a) {
  for (std::int64_t t = 0; t < a.x.dim(0); ++t) {
    const float* from = a.x.row<float>(t);
    if (a.out.dtype() == DType::kF32) {
      std::copy_n(from, a.x.dim(1), a.out.row<float>(t));
    } else {
      std::transform(from, from + a.x.dim(1), a.out.row<BFloat16>(t), numeric::bf16_from_float);
    }
  }
}

void add(const TensorView& x, const TensorView& y) {
  for (std::int64_t t = 0; t < x.dim(0); ++t) {
    const float* from = x.row<float>(t);
    float* to = y.row<float>(t);
    for (std::int64_t d = 0; d < x.dim(1); ++d) to[d] += from[d];
  }
}

// Routing decides which experts run: one rule for all host backends.
void moe_route(const ops::MoeRouteArgs& a) { ops::route(a); }

void moe_ffn(ThreadPool& pool, const ops::MoeFfnArgs& a) {
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
      linear(pool, {x, e.gate, g});
      linear(pool, {x, e.up, u});
      swiglu(pool, {g, u, g});
      linear(pool, {g, e.down, TensorView::of(out.data(), {1, width})});
      scale_add(a.out.row<float>(t), out.data(), 1.0f, a.weights.row<float>(t)[k], width);
    }
  }
}

}  // namespace snapmla::cpu
