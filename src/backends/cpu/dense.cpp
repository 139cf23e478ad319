// Embedding, norms, rotary embedding, activation: the small operations per token.
#include <algorithm>
#include <cmath>
#include <vector>

#include "backends/cpu/cpu_ops.h"
#include "backends/cpu/linear_kernels.h"
#include "ops/element.h"
#include "ops/route.h"

namespace snapmla::cpu {
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
    swiglu_row(a.gate.row<float>(t), a.up.row<float>(t), a.out.row<float>(t), a.gate.dim(1));
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

}  // namespace snapmla::cpu
