// Decode attention: one generated table of small shapes, every backend against fp64 attention over
// the stored keys, against an fp64 emulation of the FP8 scheme, and against each other. Unused
// slots and pages hold NaN, unused table entries hold junk, outputs start as NaN between guard
// bands.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "agreement/backends.h"
#include "agreement/decode_problem.h"
#include "agreement/decode_table.h"
#include "agreement/fp64_attention.h"

namespace snapmla::agreement {
namespace {

// |x - y| / |y|; NaN anywhere makes it NaN, which no bound accepts.
double relative_error(const std::vector<float>& x, const std::vector<float>& y) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    difference += (static_cast<double>(x[i]) - y[i]) * (static_cast<double>(x[i]) - y[i]);
    size += static_cast<double>(y[i]) * y[i];
  }
  return std::sqrt(difference / (size > 0 ? size : 1.0));
}

void expect_lse(const std::vector<float>& x, const std::vector<float>& y, float bound) {
  ASSERT_EQ(x.size(), y.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::isinf(y[i])) {
      EXPECT_EQ(x[i], y[i]) << "row " << i << " is empty";
    } else {
      EXPECT_NEAR(x[i], y[i], bound) << "row " << i;
    }
  }
}

class DecodeShapes : public ::testing::TestWithParam<int> {};

TEST_P(DecodeShapes, BackendsAgreeWithFp64AndEachOther) {
  const Shape shape = make_shape(GetParam());
  const auto seed = static_cast<unsigned>(GetParam());
  const bool fp8 = shape.format == KvCacheFormat::kFp8;
  // The tensor core's cut is modelled in ref alone.
  const bool ref_only = shape.accumulation == Accumulation::kTensorCore ||
                        shape.accumulation == Accumulation::kTensorCoreOneLevel;
  Problem p = make_problem(shape, seed, ref_backend());
  const auto [exact, emulated] = fp64_attention(p);
  const double scheme = relative_error(emulated.out, exact.out);
  // f32 arithmetic on scores of up to some hundreds; the accumulator of one level and 14 bits lies
  // on a grid that f32 rounding may miss by a step.
  const double rounding = 2e-5;
  float scheme_lse = 0;
  for (std::size_t i = 0; i < exact.lse.size(); ++i) {
    if (!std::isinf(exact.lse[i]))
      scheme_lse = std::max(scheme_lse, std::fabs(emulated.lse[i] - exact.lse[i]));
  }
  for (ops::OpSet* backend : {&ref_backend(), &cpu_backend()}) {
    if (ref_only && backend == &cpu_backend()) continue;
    SCOPED_TRACE(backend->name());
    Problem own = make_problem(shape, seed, *backend);
    ASSERT_TRUE(p.cache->bytes() == own.cache->bytes()) << "append_kv differs between backends";
    const Result result = own.decode(*backend);
    EXPECT_LE(relative_error(result.out, exact.out), 1.05 * scheme + rounding);
    expect_lse(result.lse, exact.lse, 1.05f * scheme_lse + (fp8 ? 1e-3f : 1e-4f));
    // A score that f32 rounds to the other side of a code's border moves that P by one step.
    expect_lse(result.lse, emulated.lse, fp8 ? 4e-3f : 1e-4f);
    EXPECT_LE(relative_error(result.out, emulated.out), fp8 ? 4e-3 : 2e-5);
    if (std::getenv("SNAPMLA_MEASURE") && fp8 && scheme > 0) {
      std::printf("MEASURED %s %d %.3e %.3e %.5f\n", backend->name(), GetParam(), scheme,
                  relative_error(result.out, exact.out),
                  relative_error(result.out, exact.out) / (scheme + rounding));
    }
    if (GetParam() % 8 != 2) continue;
    const std::vector<BFloat16> rounded = own.decode_to_bf16(*backend);
    for (std::size_t i = 0; i < rounded.size(); ++i)
      ASSERT_EQ(rounded[i].bits, bf16_bits(result.out[i])) << "element " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Table, DecodeShapes, ::testing::Range(0, 6000));

// Scales that are powers of two and no score: P is exact in f32 and in double, and what is left are
// the tensor core's cuts, here written twice. An exponent of the product, or a sum that is not cut
// itself, would be 1.6e-5 off.
TEST(TensorCoreSums, OfExactWeightsAreCutAlike) {
  for (const Accumulation accumulation :
       {Accumulation::kTensorCore, Accumulation::kTensorCoreOneLevel}) {
    for (const int p_block : {64, 128}) {
      Shape shape;
      shape.lengths = {700, 64, 5};
      shape.heads = 3;
      shape.p_block = p_block;
      shape.scale_mode = ScaleMode::kPow2;
      shape.softmax_scale = 1e-30f;
      shape.accumulation = accumulation;
      Problem p = make_problem(shape, 8, ref_backend());
      const Fp64 want = fp64_attention(p);
      const Result got = p.decode(ref_backend());
      // In one chain the sum goes through f32 in units of sigma between blocks.
      EXPECT_LT(relative_error(got.out, want.emulated.out),
                accumulation == Accumulation::kTensorCore ? 1e-6 : 1.2e-5);
      EXPECT_GT(relative_error(want.emulated.out, want.exact.out), 5e-5) << "nothing is cut";
    }
  }
}

// Results must not depend on how many threads shared the work.
TEST(DecodeThreads, ChangeNoBit) {
  for (int index = 0; index < 240; ++index) {
    Problem p = make_problem(make_shape(index), 5, ref_backend());
    if (p.shape.accumulation == Accumulation::kTensorCore ||
        p.shape.accumulation == Accumulation::kTensorCoreOneLevel)
      continue;
    const Result one = p.decode(cpu_backend()), three = p.decode(threaded_backend());
    ASSERT_EQ(one.out, three.out) << index;
    ASSERT_EQ(one.lse, three.lse) << index;
  }
}

}  // namespace
}  // namespace snapmla::agreement
