// The cpu backend's linear layers where they take other paths than small shapes do: weights shared
// by many tokens, experts shared by several, and every instruction set down to the fallback.
#include <gtest/gtest.h>

#include <hwy/targets.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/kernels.h"
#include "backends/ref/ref_backend.h"
#include "numeric/float_types.h"
#include "ops/ops.h"
#include "support/dense_operands.h"

namespace snapmla {
namespace {

using test::Floats;
using test::random_floats;
using test::TestWeight;

Floats linear(ops::OpSet& ops, const Floats& x, const ops::Weight& w) {
  const std::int64_t tokens = static_cast<std::int64_t>(x.size()) / w.in_features();
  Floats y(static_cast<std::size_t>(tokens * w.out_features()), NAN);
  ops::linear(ops, {TensorView::of(x.data(), {tokens, w.in_features()}), w,
                    TensorView::of(y.data(), {tokens, w.out_features()})});
  return y;
}

// |got - want| relative to the size of a dot product of unit normals.
void expect_near(const Floats& got, const Floats& want, std::int64_t k, const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  const float bound = 2e-6f * std::sqrt(static_cast<float>(k)) * 4;
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_NEAR(got[i], want[i], bound * (1 + std::fabs(want[i]))) << what << ", element " << i;
}

TEST(CpuLinear, TokensAndThreadsDoNotChangeARow) {
  const std::int64_t tokens = 37, in = 1000, out = 264;
  const TestWeight w(DType::kE4M3, out, in, 1);
  const Floats x = random_floats(tokens * in, 3);
  const auto ref = ref::make_ref_backend();
  const auto one = cpu::make_cpu_backend(1), three = cpu::make_cpu_backend(3);
  const Floats all = linear(*three, x, w.weight);
  expect_near(all, linear(*ref, x, w.weight), in, "37 tokens");
  for (std::int64_t t = 0; t < tokens; ++t) {
    const Floats alone =
        linear(*one, Floats(x.begin() + t * in, x.begin() + (t + 1) * in), w.weight);
    EXPECT_EQ(std::memcmp(alone.data(), all.data() + t * out, sizeof(float) * alone.size()), 0)
        << "token " << t;
  }
}

TEST(CpuMoe, AgreesWithRefAndTokensAreIndependent) {
  const std::int64_t tokens = 29, width = 136, inner = 72, top_k = 3, experts = 7;
  std::vector<std::unique_ptr<TestWeight>> memory;
  const auto make = [&](std::int64_t out, std::int64_t in) {
    memory.push_back(std::make_unique<TestWeight>(DType::kE4M3, out, in,
                                                  10 + static_cast<unsigned>(memory.size())));
    return memory.back()->weight;
  };
  std::vector<ops::ExpertWeights> list;
  for (int e = 0; e < experts; ++e)
    list.push_back({make(inner, width), make(inner, width), make(width, inner)});
  Floats x = random_floats(tokens * width, 5);
  for (float& v : x) v *= 0.1f;
  const Floats weights = random_floats(tokens * top_k, 6);
  std::vector<std::int32_t> ids;
  std::mt19937 rng(8);
  for (std::int64_t i = 0; i < tokens * top_k; ++i)
    ids.push_back(static_cast<std::int32_t>(rng() % static_cast<unsigned>(experts - 1)));
  const auto ffn = [&](ops::OpSet& ops, std::int64_t first, std::int64_t count) {
    Floats y = random_floats(tokens * width, 9);
    y = Floats(y.begin() + first * width, y.begin() + (first + count) * width);
    ops::moe_ffn(ops, {TensorView::of(x.data() + first * width, {count, width}),
                       TensorView::of(ids.data() + first * top_k, {count, top_k}),
                       TensorView::of(weights.data() + first * top_k, {count, top_k}), &list,
                       TensorView::of(y.data(), {count, width})});
    return y;
  };
  const auto ref = ref::make_ref_backend();
  const auto one = cpu::make_cpu_backend(1), three = cpu::make_cpu_backend(3);
  const Floats all = ffn(*three, 0, tokens), want = ffn(*ref, 0, tokens);
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    difference += std::pow(static_cast<double>(all[i]) - want[i], 2);
    size += std::pow(static_cast<double>(want[i]), 2);
  }
  EXPECT_LE(std::sqrt(difference / size), 1e-5);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const Floats alone = ffn(*one, t, 1);
    EXPECT_EQ(std::memcmp(alone.data(), all.data() + t * width, sizeof(float) * alone.size()), 0)
        << "token " << t;
  }
}

TEST(CpuLinear, EverySimdTargetAgreesWithRef) {
  const std::int64_t in = 300, out = 140;
  const TestWeight w(DType::kE4M3, out, in, 2);
  const auto ref = ref::make_ref_backend(), cpu = cpu::make_cpu_backend(1);
  const auto use = [](std::int64_t targets) {
    hwy::SetSupportedTargetsForTest(targets);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  };
  for (std::int64_t targets = hwy::SupportedTargets(); targets != 0; targets &= targets - 1) {
    use(targets & -targets);
    for (std::int64_t tokens : {1, 8}) {
      const Floats x = random_floats(tokens * in, 4);
      expect_near(linear(*cpu, x, w.weight), linear(*ref, x, w.weight), in, cpu::simd_target());
    }
  }
  use(0);
}

}  // namespace
}  // namespace snapmla
