// YaRN's frequencies and the table's layout.
#include "model/rope_table.h"

#include <gtest/gtest.h>

#include <cmath>

namespace snapmla::model {
namespace {

ModelConfig yarn(double theta, double factor, double fast, double slow) {
  ModelConfig c;
  c.rope_theta = theta;
  c.yarn = RopeScaling{factor, fast, slow, 1.0, 1.0, 4096};
  return c;
}

// Pairs up to `low` keep their frequency, pairs from `high` on are divided by the factor.
void expect_ramp(const ModelConfig& c, std::size_t low, std::size_t high) {
  const std::vector<double> f = rope_frequencies(c);
  ASSERT_EQ(f.size(), 32u);
  for (std::size_t j = 0; j < 32; ++j) {
    const double base = std::pow(c.rope_theta, -static_cast<double>(j) / 32.0);
    const double ratio = f[j] / base;
    const double ramp = j <= low ? 0.0
                        : j >= high
                            ? 1.0
                            : static_cast<double>(j - low) / static_cast<double>(high - low);
    EXPECT_NEAR(ratio, 1.0 - ramp + ramp / c.yarn->factor, 1e-12) << j;
  }
}

TEST(RopeTable, DeepSeekRampIs10To23) { expect_ramp(yarn(1e4, 40, 32, 1), 10, 23); }
TEST(RopeTable, KimiRampIs19To20) { expect_ramp(yarn(5e4, 32, 1, 1), 19, 20); }

TEST(RopeTable, HoldsCosAndSinOfDoubleAngles) {
  ModelConfig c;
  const std::vector<float> table = build_rope_table(c, 100001);
  ASSERT_EQ(table.size(), 100001u * 64u);
  for (std::size_t j = 0; j < 32; ++j) {
    const double angle = 100000.0 * std::pow(1e4, -static_cast<double>(j) / 32.0);
    EXPECT_NEAR(table[100000 * 64 + 2 * j], std::cos(angle), 1e-7) << j;
    EXPECT_NEAR(table[100000 * 64 + 2 * j + 1], std::sin(angle), 1e-7) << j;
    EXPECT_EQ(table[2 * j], 1.0f);
    EXPECT_EQ(table[2 * j + 1], 0.0f);
  }
}

TEST(RopeTable, MultiplierNeedsBothFactors) {
  ModelConfig c = yarn(1e4, 40, 32, 1);
  EXPECT_EQ(build_rope_table(c, 1)[0], 1.0f);
  c.yarn->mscale = 0.0;
  EXPECT_NEAR(build_rope_table(c, 1)[0], 1.368888, 1e-6);
  c.yarn->mscale = 1.0;
  c.yarn->mscale_all_dim = 0.707;
  EXPECT_NEAR(build_rope_table(c, 1)[0], 1.368888 / 1.260804, 1e-6);
}

}  // namespace
}  // namespace snapmla::model
