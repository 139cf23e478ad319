// e4m3 and bf16 over all codes and all bf16 inputs, against a slow search for the nearest code; the
// scale rule.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "numeric/scale.h"
#include "numeric/softmax.h"

namespace snapmla::numeric {
namespace {

// The definition: sign, exponent bias 7, three mantissa bits, 0x7f NaN.
double e4m3_value(int code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code & 128 ? -magnitude : magnitude;
}

TEST(E4M3, DecodesEveryCode) {
  for (int code = 0; code < 256; ++code) {
    const float value = e4m3_to_float(Float8E4M3{static_cast<std::uint8_t>(code)});
    if ((code & 127) == 127) {
      EXPECT_TRUE(std::isnan(value)) << code;
    } else {
      EXPECT_EQ(value, e4m3_value(code)) << code;
      EXPECT_EQ(std::signbit(value), (code & 128) != 0) << code;
      EXPECT_EQ(e4m3_from_float(value).bits, code);
    }
  }
}

// Nearest code, ties to the even one, saturating.
int nearest(double x) {
  const double magnitude = std::min(std::fabs(x), 448.0);
  int best = 0;
  for (int code = 1; code < 127; ++code) {
    const double now = std::fabs(e4m3_value(code) - magnitude),
                 before = std::fabs(e4m3_value(best) - magnitude);
    if (now < before || (now == before && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(x) ? 128 : 0);
}

TEST(E4M3, EncodesEveryBf16InputToTheNearestCode) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = bf16_to_float(BFloat16{static_cast<std::uint16_t>(bits)});
    const int got = e4m3_from_float(x).bits;
    if (std::isnan(x)) {
      ASSERT_EQ(got, 0x7f) << bits;
    } else {
      ASSERT_EQ(got, nearest(x)) << x;
    }
  }
}

TEST(E4M3, RoundsTiesToEvenBetweenBf16Values) {
  EXPECT_EQ(e4m3_from_float(std::nextafterf(0x1p-10f, 1.0f)).bits, 1);
  EXPECT_EQ(e4m3_from_float(0x1p-10f).bits, 0);
  EXPECT_EQ(e4m3_from_float(464.0f).bits, 0x7e);
  EXPECT_EQ(e4m3_from_float(1e30f).bits, 0x7e);
  EXPECT_EQ(e4m3_from_float(-INFINITY).bits, 0xfe);
}

TEST(BF16, RoundsToNearestEven) {
  EXPECT_EQ(bf16_from_float(float_of(0x3f808000u)).bits, 0x3f80);  // tie to even, down
  EXPECT_EQ(bf16_from_float(float_of(0x3f818000u)).bits, 0x3f82);  // tie to even, up
  EXPECT_EQ(bf16_from_float(float_of(0x3f808001u)).bits, 0x3f81);
  EXPECT_EQ(bf16_from_float(std::numeric_limits<float>::max()).bits, 0x7f80);
  EXPECT_EQ(bf16_from_float(NAN).bits, 0x7fff);
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const BFloat16 x{static_cast<std::uint16_t>(bits)};
    if (!is_nan(bf16_to_float(x))) {
      ASSERT_EQ(bf16_from_float(bf16_to_float(x)).bits, bits);
    }
  }
}

TEST(TokenScale, EdgeCases) {
  const auto amax = ScaleMode::kAmax;
  EXPECT_EQ(token_scale(0.0f, 5.0f, true, amax), 1.0f);  // zero latent: no division by zero
  EXPECT_EQ(token_scale(448.0f, 0.0f, true, amax), 1.0f);
  EXPECT_EQ(token_scale(1.0f, 0.0f, true, amax), 1.0f / 448.0f);
  EXPECT_TRUE(
      std::isnan(token_scale(1.0f, 1.0f, false, amax)));       // NaN or Inf anywhere in the token
  EXPECT_EQ(token_scale(1e-30f, 0.0f, true, amax), 0x1p-60f);  // never subnormal
  EXPECT_EQ(token_scale(1e-30f, 1.0f, true, amax), 0x1p-40f);  // rope / s stays finite
  EXPECT_EQ(token_scale(1.0f, 0.0f, true, ScaleMode::kPow2), 0x1p-8f);  // 1/448 rounded up
  EXPECT_EQ(token_scale(448.0f, 0.0f, true, ScaleMode::kPow2), 1.0f);
}

TEST(QuantizeP, LargestCodeIs448AndMaskedIsZero) {
  for (float m : {-1000.0f, -3.7f, 0.0f, 12.34f, 900.0f}) {
    EXPECT_EQ(e4m3_to_float(quantize_p(m, m)), 448.0f);
    EXPECT_EQ(quantize_p(-INFINITY, m).bits, 0);
    EXPECT_TRUE(std::isnan(e4m3_to_float(quantize_p(NAN, m))));
  }
}

TEST(BeginBlock, ReferenceMovesOnlyPastItsSlack) {
  RowState row;
  EXPECT_TRUE(begin_block(row, -INFINITY, false).skip);
  EXPECT_EQ(begin_block(row, 1.0f, false).rescale, 1.0f);
  EXPECT_EQ(row.reference, 1.0f);
  row.sum = 2.0f;
  const BlockFactors lag = begin_block(row, 41.0f, false);
  EXPECT_EQ(row.reference, 1.0f);
  EXPECT_EQ(lag.sigma, std::exp2(40.0f) / 448.0f);
  const BlockFactors moved = begin_block(row, 42.0f, false);
  EXPECT_EQ(row.reference, 42.0f);
  EXPECT_EQ(moved.rescale, std::exp2(-41.0f));
  EXPECT_EQ(row.sum, 2.0f * std::exp2(-41.0f));
}

}  // namespace
}  // namespace snapmla::numeric
