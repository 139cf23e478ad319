// The cpu backend's dense operations against ref, and row independence bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "backends/ref/ref_backend.h"
#include "numeric/float_types.h"
#include "ops/ops.h"
#include "support/dense_operands.h"

namespace snapmla {
namespace {

using test::expect_near;
using test::Floats;
using test::poisoned;
using test::random_floats;
using test::TestWeight;

struct Shape {
  DType type;
  std::int64_t tokens, out, in;
};

class Linear : public testing::TestWithParam<Shape> {
 protected:
  Floats run(ops::OpSet& ops, const Floats& x, std::int64_t tokens, const ops::Weight& w) {
    Floats y = poisoned(tokens * w.out_features());
    ops::linear(ops, {TensorView::of(x.data(), {tokens, w.in_features()}), w,
                      TensorView::of(y.data(), {tokens, w.out_features()})});
    return y;
  }
};

TEST_P(Linear, AgreesWithRefAndRowsAreIndependent) {
  const auto [type, tokens, out, in] = GetParam();
  const TestWeight w(type, out, in, 3);
  const Floats x = random_floats(tokens * in, 9);
  const auto ref = ref::make_ref_backend();
  const auto cpu = cpu::make_cpu_backend(2);
  const Floats all = run(*cpu, x, tokens, w.weight);
  expect_near(all, run(*ref, x, tokens, w.weight), 1e-4);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const Floats row(x.begin() + t * in, x.begin() + (t + 1) * in);
    const Floats alone = run(*cpu, row, 1, w.weight);
    EXPECT_EQ(std::memcmp(alone.data(), all.data() + t * out, alone.size() * sizeof(float)), 0)
        << "row " << t;
  }
}

std::vector<Shape> shapes() {
  std::vector<Shape> list;
  for (DType type : {DType::kF32, DType::kBF16, DType::kE4M3}) {
    for (std::int64_t tokens : {1, 3, 9}) {
      for (std::int64_t in : {1, 7, 127, 128, 129, 300}) {
        for (std::int64_t out : {1, 17, 128, 131}) list.push_back({type, tokens, out, in});
      }
    }
  }
  return list;
}
INSTANTIATE_TEST_SUITE_P(Shapes, Linear, testing::ValuesIn(shapes()));

TEST(Dense, HeadLinearAgreesWithRef) {
  for (DType type : {DType::kF32, DType::kBF16}) {
    const std::int64_t tokens = 3, heads = 5, out = 33, in = 19;
    TestWeight w(type, heads * out, in, 4);
    const TensorView weight(w.weight.data.raw(), type, {heads, out, in});
    const Floats x = random_floats(tokens * heads * in, 5);
    Floats y[2] = {poisoned(tokens * heads * out), poisoned(tokens * heads * out)};
    const auto ref = ref::make_ref_backend();
    const auto cpu = cpu::make_cpu_backend(2);
    int i = 0;
    for (ops::OpSet* ops : {ref.get(), cpu.get()}) {
      ops::head_linear(*ops, {TensorView::of(x.data(), {tokens, heads, in}), weight,
                              TensorView::of(y[i].data(), {tokens, heads, out})});
      ++i;
    }
    expect_near(y[1], y[0], 1e-5);
  }
}

TEST(Dense, RmsNormRopeSwigluAndAddAgreeWithRef) {
  for (std::int64_t width : {2, 6, 64, 130}) {
    const std::int64_t tokens = 4;
    const Floats weight = random_floats(width, 1), table = random_floats(8 * width, 2);
    const std::vector<std::int32_t> positions = {7, 0, 3, 3};
    const auto ref = ref::make_ref_backend();
    const auto cpu = cpu::make_cpu_backend(2);
    for (bool interleaved : {true, false}) {
      Floats result[2];
      int i = 0;
      for (ops::OpSet* ops : {ref.get(), cpu.get()}) {
        const Floats x = random_floats(tokens * width, 6);
        Floats y = poisoned(tokens * width);
        const TensorView xs = TensorView::of(x.data(), {tokens, width});
        const TensorView ys = TensorView::of(y.data(), {tokens, width});
        ops::rms_norm(*ops, {xs, TensorView::of(weight.data(), {width}), 1e-6f, ys});
        ops::rope(*ops, {TensorView::of(y.data(), {tokens, 1, width}),
                         TensorView::of(positions.data(), {tokens}),
                         TensorView::of(table.data(), {8, width}), interleaved});
        ops::swiglu(*ops, {ys, xs, ys});
        ops::add(*ops, xs, ys);
        result[i++] = y;
      }
      expect_near(result[1], result[0], 1e-5);
    }
  }
}

TEST(Dense, HalfRopeLeavesPairsInterleavedWhenAsked) {
  const std::int64_t width = 6;
  const Floats table = random_floats(4 * width, 2);
  const std::vector<std::int32_t> positions = {3, 1};
  for (ops::OpSet* ops : {ref::make_ref_backend().release(), cpu::make_cpu_backend(2).release()}) {
    const std::unique_ptr<ops::OpSet> owned(ops);
    Floats plain = random_floats(2 * width, 6), pairs = plain;
    ops::RopeArgs a{TensorView::of(plain.data(), {2, 1, width}),
                    TensorView::of(positions.data(), {2}), TensorView::of(table.data(), {4, width}),
                    false};
    ops::rope(*ops, a);
    a.x = TensorView::of(pairs.data(), {2, 1, width});
    a.to_interleaved = true;
    ops::rope(*ops, a);
    for (std::size_t row = 0; row < 2; ++row) {
      for (std::size_t j = 0; j < 3; ++j) {
        EXPECT_EQ(pairs[row * 6 + 2 * j], plain[row * 6 + j]);
        EXPECT_EQ(pairs[row * 6 + 2 * j + 1], plain[row * 6 + j + 3]);
      }
    }
  }
}

TEST(Dense, CopyRowsHonoursStridesAndRounds) {
  const Floats x = random_floats(3 * 7, 6);
  const TensorView from = TensorView::of(x.data() + 2, {3, 4}).with_stride(0, 7);
  for (ops::OpSet* ops : {ref::make_ref_backend().release(), cpu::make_cpu_backend(2).release()}) {
    const std::unique_ptr<ops::OpSet> owned(ops);
    Floats f32 = poisoned(3 * 5);
    std::vector<BFloat16> bf16(3 * 5, BFloat16{0x1234});
    ops::copy_rows(*ops, {from, TensorView::of(f32.data(), {3, 4}).with_stride(0, 5)});
    ops::copy_rows(*ops, {from, TensorView::of(bf16.data(), {3, 4}).with_stride(0, 5)});
    for (std::size_t row = 0; row < 3; ++row) {
      for (std::size_t d = 0; d < 4; ++d) {
        EXPECT_EQ(f32[row * 5 + d], x[row * 7 + d + 2]);
        EXPECT_EQ(bf16[row * 5 + d].bits, numeric::bf16_from_float(x[row * 7 + d + 2]).bits);
      }
      EXPECT_TRUE(std::isnan(f32[row * 5 + 4]));
      EXPECT_EQ(bf16[row * 5 + 4].bits, 0x1234);
    }
  }
}

TEST(Dense, MoeFfnAgreesWithRefAndAccumulates) {
  const std::int64_t tokens = 3, width = 40, inner = 21, top_k = 2;
  std::vector<std::unique_ptr<TestWeight>> memory;
  std::vector<ops::ExpertWeights> experts;
  const auto make = [&](std::int64_t out, std::int64_t in) {
    memory.push_back(
        std::make_unique<TestWeight>(DType::kBF16, out, in, static_cast<unsigned>(memory.size())));
    return memory.back()->weight;
  };
  for (int e = 0; e < 4; ++e)
    experts.push_back({make(inner, width), make(inner, width), make(width, inner)});
  const Floats x = random_floats(tokens * width, 8), start = random_floats(tokens * width, 10);
  const std::vector<std::int32_t> ids = {0, 3, 2, 1, 3, 2};
  const Floats weights = {0.7f, 0.3f, 1.5f, 0.1f, 0.0f, 1.0f};
  Floats y[2] = {start, start};
  const auto ref = ref::make_ref_backend();
  const auto cpu = cpu::make_cpu_backend(2);
  int i = 0;
  for (ops::OpSet* ops : {ref.get(), cpu.get()}) {
    ops::moe_ffn(*ops, {TensorView::of(x.data(), {tokens, width}),
                        TensorView::of(ids.data(), {tokens, top_k}),
                        TensorView::of(weights.data(), {tokens, top_k}), &experts,
                        TensorView::of(y[i].data(), {tokens, width})});
    ++i;
  }
  EXPECT_NE(y[0], start);
  expect_near(y[1], y[0], 1e-4);
}

}  // namespace
}  // namespace snapmla
