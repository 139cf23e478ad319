// Embedding, linear layers, norms, rotary embedding, activation.
#include <cmath>
#include <vector>

#include "backends/ref/ref_ops.h"
#include "ops/element.h"

namespace snapmla::ref {

void embed(const ops::EmbedArgs& a) {
  for (std::int64_t t = 0; t < a.ids.dim(0); ++t) {
    const std::int64_t row = a.ids.data<std::int32_t>()[t] * a.table.stride(0);
    for (std::int64_t d = 0; d < a.table.dim(1); ++d) {
      a.out.row<float>(t)[d] = ops::load(a.table.raw(), a.table.dtype(), row + d);
    }
  }
}

void linear(const ops::LinearArgs& a) {
  for (std::int64_t t = 0; t < a.x.dim(0); ++t) {
    for (std::int64_t n = 0; n < a.weight.out_features(); ++n) {
      double sum = 0;
      for (std::int64_t k = 0; k < a.weight.in_features(); ++k) {
        sum += static_cast<double>(a.x.row<float>(t)[k]) * ops::weight_at(a.weight, n, k);
      }
      a.out.row<float>(t)[n] = static_cast<float>(sum);
    }
  }
}

void head_linear(const ops::HeadLinearArgs& a) {
  const TensorView& w = a.weight;
  for (std::int64_t t = 0; t < a.x.dim(0); ++t) {
    for (std::int64_t h = 0; h < w.dim(0); ++h) {
      for (std::int64_t n = 0; n < w.dim(1); ++n) {
        double sum = 0;
        for (std::int64_t k = 0; k < w.dim(2); ++k) {
          sum += static_cast<double>(a.x.row<float>(t, h)[k]) *
                 ops::load(w.raw(), w.dtype(), h * w.stride(0) + n * w.stride(1) + k);
        }
        a.out.row<float>(t, h)[n] = static_cast<float>(sum);
      }
    }
  }
}

void rms_norm(const ops::RmsNormArgs& a) {
  const std::int64_t width = a.x.dim(1);
  for (std::int64_t t = 0; t < a.x.dim(0); ++t) {
    const float* x = a.x.row<float>(t);
    double squares = 0;
    for (std::int64_t d = 0; d < width; ++d) squares += static_cast<double>(x[d]) * x[d];
    const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(width) + a.eps);
    for (std::int64_t d = 0; d < width; ++d) {
      const double w = ops::load(a.weight.raw(), a.weight.dtype(), d);
      a.out.row<float>(t)[d] = static_cast<float>(w * (x[d] * inverse));
    }
  }
}

void rope(const ops::RopeArgs& a) {
  const std::int64_t half = a.x.dim(2) / 2;
  for (std::int64_t t = 0; t < a.x.dim(0); ++t) {
    const float* table = a.cos_sin.row<float>(a.positions.data<std::int32_t>()[t]);
    for (std::int64_t h = 0; h < a.x.dim(1); ++h) {
      float* x = a.x.row<float>(t, h);
      for (std::int64_t j = 0; j < half; ++j) {
        float& first = a.interleaved ? x[2 * j] : x[j];
        float& second = a.interleaved ? x[2 * j + 1] : x[j + half];
        const double c = table[2 * j], s = table[2 * j + 1], p = first, q = second;
        first = static_cast<float>(p * c - q * s);
        second = static_cast<float>(p * s + q * c);
      }
      if (a.interleaved || !a.to_interleaved) continue;
      const std::vector<float> halves(x, x + 2 * half);
      for (std::int64_t j = 0; j < half; ++j) {
        x[2 * j] = halves[static_cast<std::size_t>(j)];
        x[2 * j + 1] = halves[static_cast<std::size_t>(j + half)];
      }
    }
  }
}

void swiglu(const ops::SwigluArgs& a) {
  for (std::int64_t t = 0; t < a.gate.dim(0); ++t) {
    for (std::int64_t d = 0; d < a.gate.dim(1); ++d) {
      const double g = a.gate.row<float>(t)[d];
      a.out.row<float>(t)[d] = static_cast<float>(g / (1.0 + std::exp(-g)) * a.up.row<float>(t)[d]);
    }
  }
}

void copy_rows(const ops::CopyRowsArgs& a) {
  for (std::int64_t t = 0; t < a.x.dim(0); ++t) {
    for (std::int64_t d = 0; d < a.x.dim(1); ++d) {
      ops::store(a.out.raw(), a.out.dtype(), t * a.out.stride(0) + d, a.x.row<float>(t)[d]);
    }
  }
}

void add(const TensorView& x, const TensorView& y) {
  for (std::int64_t t = 0; t < x.dim(0); ++t) {
    for (std::int64_t d = 0; d < x.dim(1); ++d) y.row<float>(t)[d] += x.row<float>(t)[d];
  }
}

}  // namespace snapmla::ref
