// The number rules: conversions against the CUDA toolkit's tables, the scale rule's edges, P and
// the tensor-core model.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "numeric/scale.h"
#include "numeric/softmax.h"
#include "numeric/tensor_core.h"

namespace snapmla::numeric {
namespace {

// e4m3.bin, as tools/gen_numeric_tables.cpp writes it.
std::vector<std::uint8_t> cuda_table() {
  std::ifstream in(SNAPMLA_SOURCE_DIR "/tests/numeric/e4m3.bin", std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

TEST(E4M3, EveryBf16InputMatchesCuda) {
  const std::vector<std::uint8_t> table = cuda_table();
  ASSERT_EQ(table.size(), 65536u + 1024u);
  for (std::uint32_t i = 0; i < 65536; ++i) {
    ASSERT_EQ(e4m3_from_float(float_of(i << 16)).bits, table[i]) << "bf16 bits " << i;
  }
}

TEST(E4M3, EveryCodeMatchesCudaAndRoundTrips) {
  const std::vector<std::uint8_t> table = cuda_table();
  ASSERT_EQ(table.size(), 65536u + 1024u);
  for (int code = 0; code < 256; ++code) {
    const float value = e4m3_to_float(Float8E4M3{static_cast<std::uint8_t>(code)});
    if ((code & 0x7f) == 0x7f) {
      EXPECT_TRUE(std::isnan(value));
      continue;
    }
    std::uint32_t expected;
    std::memcpy(&expected, &table[static_cast<std::size_t>(65536 + 4 * code)], 4);
    EXPECT_EQ(bits_of(value), expected) << "code " << code;
    EXPECT_EQ(e4m3_from_float(value).bits, code);
  }
}

// Ties lie between bf16 values of few bits; their f32 neighbours must round away from the tie.
TEST(E4M3, NeighboursOfEveryTieRoundToTheNearerCode) {
  for (std::uint8_t code = 0; code < 0x7e; ++code) {
    const float low = e4m3_to_float(Float8E4M3{code});
    const float high = e4m3_to_float(Float8E4M3{static_cast<std::uint8_t>(code + 1)});
    const float tie = 0.5f * (low + high);
    EXPECT_EQ(e4m3_from_float(std::nextafter(tie, 0.0f)).bits, code);
    EXPECT_EQ(e4m3_from_float(std::nextafter(tie, 1e9f)).bits, code + 1);
    EXPECT_EQ(e4m3_from_float(tie).bits, code + (code & 1)) << "a tie goes to the even code";
  }
}

TEST(BF16, EveryPatternRoundTripsAndTiesGoToEven) {
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const float value = bf16_to_float(BFloat16{static_cast<std::uint16_t>(i)});
    if (std::isnan(value)) {
      EXPECT_EQ(bf16_from_float(value).bits, 0x7fff);
      continue;
    }
    ASSERT_EQ(bf16_from_float(value).bits, i);
    if (!std::isfinite(value)) continue;
    EXPECT_EQ(bf16_from_float(float_of(i << 16 | 0x7fffu)).bits, i);
    EXPECT_EQ(bf16_from_float(float_of(i << 16 | 0x8000u)).bits, i + (i & 1));
    EXPECT_EQ(bf16_from_float(float_of(i << 16 | 0x8001u)).bits, i + 1);
  }
}

TEST(TokenScale, Edges) {
  const ScaleMode amax = ScaleMode::kAmax;
  EXPECT_EQ(token_scale(0, 0, true, amax), 1.0f);
  EXPECT_EQ(token_scale(0, 1e30f, true, amax), 1.0f);
  EXPECT_EQ(token_scale(448, 1, true, amax), 1.0f);
  EXPECT_EQ(token_scale(7, 0, true, amax), 7.0f / 448.0f);
  EXPECT_EQ(token_scale(1e-30f, 0, true, amax), 0x1p-60f);
  EXPECT_EQ(token_scale(1e-30f, 1024, true, amax), 0x1p-30f);
  EXPECT_TRUE(std::isnan(token_scale(1, 1, false, amax)));
  EXPECT_TRUE(std::isnan(token_scale(0, 0, false, amax)));
}

TEST(TokenScale, PowerOfTwoIsTheNextOneUp) {
  std::mt19937 rng(3);
  for (int i = 0; i < 1000; ++i) {
    const float a = std::ldexp(1.0f + static_cast<float>(rng() % 4096) / 4096.0f,
                               static_cast<int>(rng() % 80) - 40);
    const float s = token_scale(a, 0, true, ScaleMode::kAmax);
    const float p = token_scale(a, 0, true, ScaleMode::kPow2);
    int exponent = 0;
    EXPECT_EQ(std::frexp(p, &exponent), 0.5f);
    EXPECT_GE(p, s);
    EXPECT_LT(p, 2 * s);
  }
}

TEST(TokenScale, LargestElementIsExactAndRopeStaysFinite) {
  std::mt19937 rng(5);
  for (int i = 0; i < 1000; ++i) {
    const float a = std::ldexp(1.0f + static_cast<float>(rng() % 4096) / 4096.0f,
                               static_cast<int>(rng() % 60) - 30);
    const float s = token_scale(a, 1.0f, true, ScaleMode::kAmax);
    if (s == a / kE4M3Max) {
      EXPECT_EQ(quantize_latent(a, s).bits, 0x7e);
    }
    EXPECT_TRUE(is_finite(bf16_to_float(quantize_rope(1.0f, s))));
  }
}

TEST(P, LargestCodeIsExactly448AndMaskedIsZero) {
  for (float m : {-300.0f, -1.5f, 0.0f, 0.3f, 90.0f}) {
    EXPECT_EQ(quantize_p(m, m).bits, 0x7e);
    EXPECT_EQ(quantize_p(-INFINITY, m).bits, 0);
    EXPECT_TRUE(is_nan(e4m3_to_float(quantize_p(std::nanf(""), m))));
  }
}

TEST(P, ReferenceMovesOnlyPastTheSlack) {
  RowState row;
  EXPECT_TRUE(begin_block(row, -INFINITY, false).skip);
  EXPECT_EQ(row_lse2(row), -INFINITY);
  EXPECT_EQ(begin_block(row, 2.0f, false).sigma, 1.0f / 448.0f);
  row.sum = 1;
  EXPECT_EQ(begin_block(row, 42.0f, false).rescale, 1.0f);
  EXPECT_EQ(row.reference, 2.0f);
  EXPECT_EQ(begin_block(row, 43.0f, false).rescale, 0x1p-41f);
  EXPECT_EQ(row.reference, 43.0f);
  EXPECT_EQ(row.sum, 0x1p-41f);
}

TEST(P, ScaleThatIsNotPositiveIsNaN) {
  for (float s : {0.0f, -1.0f, std::nanf("")}) EXPECT_TRUE(is_nan(log2_scale(s)));
}

// Relative error of a chain of products, promoted to f64 every `promote`.
double chain_error(const std::vector<float>& a, const std::vector<float>& b, std::size_t promote) {
  double total = 0, exact = 0;
  float acc = 0;
  for (std::size_t i = 0; i < a.size(); i += kTensorCoreGroup) {
    acc = tensor_core_add(acc, std::span(a).subspan(i, kTensorCoreGroup),
                          std::span(b).subspan(i, kTensorCoreGroup));
    for (std::size_t j = i; j < i + kTensorCoreGroup; ++j) exact += a[j] * b[j];
    if ((i + kTensorCoreGroup) % promote == 0) total += acc, acc = 0;
  }
  return (exact - total - acc) / exact;
}

// The hardware's figures: a chain over 4096 loses percents, always towards zero; promoted every
// 128 it loses less than 1e-3; sums of ones are exact.
TEST(TensorCoreModel, LongChainsLoseAndPromotionRepairs) {
  std::mt19937 rng(9);
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  std::vector<float> a(4096), b(4096);
  for (std::size_t i = 0; i < a.size(); ++i) {
    a[i] = e4m3_to_float(e4m3_from_float(uniform(rng)));
    b[i] = e4m3_to_float(e4m3_from_float(uniform(rng)));
  }
  const double chain = chain_error(a, b, 4096), promoted = chain_error(a, b, 128);
  EXPECT_GT(chain, 1e-2);
  EXPECT_LT(chain, 2e-1);
  EXPECT_GT(promoted, 0.0);
  EXPECT_LT(promoted, 2e-3);
  EXPECT_LT(promoted, chain / 20);
  const std::vector<float> ones(8192, 1.0f);
  EXPECT_EQ(chain_error(ones, ones, 8192), 0.0);
}

float add(float accumulator, std::vector<float> a, std::vector<float> b) {
  return tensor_core_add(accumulator, a, b);
}

// Where the rule cuts: the exponents are the operands', and the sum is cut once more.
TEST(TensorCoreModel, CutsAtTheLargestExponentOfOperandsAndAtTheSumsOwn) {
  EXPECT_EQ(add(0, {1, 1}, {1, 0x1p-9f}), 1 + 0x1p-9f);
  // 2^-13 is the last bit beside 1, and beside 1.5 * 1.5, whose operands' exponents are 0.
  EXPECT_EQ(add(0x1p-13f, {1}, {1}), 1 + 0x1p-13f);
  EXPECT_EQ(add(0x1p-14f, {1}, {1}), 1);
  EXPECT_EQ(add(-0x1p-14f, {1}, {1}), 1);                       // towards zero
  EXPECT_EQ(add(-0x1p-13f, {1.5f}, {1.5f}), 2.25f - 0x1p-12f);  // 2.25 - 2^-13, cut once more
  EXPECT_EQ(add(-0x1p-13f, {1.5f, -1.25f}, {1.5f, 1}), 1 - 0x1p-13f);
  EXPECT_EQ(add(0x1p-12f, {1, 1, 1, 1}, {1, 1, 1, 1}), 4);  // the sum's last bit is 2^-11
  EXPECT_EQ(add(0x1p-11f, {1, 1, 1, 1}, {1, 1, 1, 1}), 4 + 0x1p-11f);
  // A subnormal has exponent -6: 2^-9 * 2^-9 counts as 2^-12, which cuts at 2^-25.
  EXPECT_EQ(add(0x1p-26f, {0x1p-9f}, {0x1p-9f}), 0x1p-18f);
  EXPECT_EQ(add(0x1p-25f, {0x1p-9f}, {0x1p-9f}), 0x1p-18f + 0x1p-25f);
  EXPECT_EQ(add(0x1p-30f, {448, 0}, {0, 448}), 0x1p-30f);  // products that are 0 cut nothing
  EXPECT_EQ(add(0, {}, {}), 0);
  EXPECT_TRUE(is_nan(add(0, {1, quiet_nan()}, {1, 1})));
}

TEST(TensorCoreModel, CodesComeBackFromValueOverScale) {
  std::mt19937 rng(10);
  std::uniform_real_distribution<float> exponent(-20.0f, 20.0f);
  int off = 0;
  for (int i = 0; i < 200; ++i) {
    const float scale = std::exp2(exponent(rng));
    for (int bits = 0; bits < 256; ++bits) {
      const float code = e4m3_to_float(Float8E4M3{static_cast<std::uint8_t>(bits)});
      if (is_nan(code)) continue;
      const float back = code * scale / scale;
      off += back != code;
      EXPECT_EQ(snap_to_e4m3(back), code) << bits << " " << scale;
    }
  }
  EXPECT_GT(off, 1000) << "nothing had to be done";
  for (const float x : {1.001f, 0.9999f, 0x1p-10f, 0x1.8p-9f, 0x1p-9f * 1.01f, 600.0f, INFINITY})
    EXPECT_EQ(snap_to_e4m3(x), x);  // what is no code stays
  EXPECT_EQ(snap_to_e4m3(std::nextafter(1.0f, 0.0f)), 1.0f);
  EXPECT_EQ(snap_to_e4m3(-std::nextafter(0x1p-6f, 0.0f)), -0x1p-6f);
  EXPECT_TRUE(is_nan(snap_to_e4m3(quiet_nan())));
}

}  // namespace
}  // namespace snapmla::numeric
