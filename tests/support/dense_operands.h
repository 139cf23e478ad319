// Operands of the dense operations' tests: random and poisoned values, weights of all types, and
// how results are compared.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "numeric/float_types.h"
#include "ops/op_set.h"

namespace snapmla::test {

using Floats = std::vector<float>;
inline constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

inline Floats random_floats(std::int64_t n, unsigned seed) {
  std::mt19937 gen(seed);
  std::normal_distribution<float> normal;
  Floats v(static_cast<std::size_t>(n));
  for (float& x : v) x = normal(gen);
  return v;
}

inline Floats poisoned(std::int64_t n) { return Floats(static_cast<std::size_t>(n), kPoison); }

inline void expect_near(const Floats& got, const Floats& want, double tolerance) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], tolerance * (1.0 + std::fabs(want[i]))) << "element " << i;
  }
}

inline bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// A random weight [out, in] of one of the three types, with its memory.
struct TestWeight {
  TestWeight(DType type, std::int64_t out, std::int64_t in, unsigned seed)
      : f32(random_floats(out * in, seed)) {
    const std::int64_t rows = (out + 127) / 128, cols = (in + 127) / 128;
    scales = random_floats(rows * cols, seed + 1);
    for (float w : f32) {
      bf16.push_back(numeric::bf16_from_float(w));
      e4m3.push_back(numeric::e4m3_from_float(w));
    }
    if (type == DType::kF32) weight.data = TensorView::of(f32.data(), {out, in});
    if (type == DType::kBF16) weight.data = TensorView::of(bf16.data(), {out, in});
    if (type == DType::kE4M3) {
      weight.data = TensorView::of(e4m3.data(), {out, in});
      weight.scale_inv = TensorView::of(scales.data(), {rows, cols});
    }
  }
  Floats f32, scales;
  std::vector<BFloat16> bf16;
  std::vector<Float8E4M3> e4m3;
  ops::Weight weight;
};

}  // namespace snapmla::test
