// The cpu backend's sums in the tensor core's arithmetic against numeric/tensor_core.h, bit for
// bit.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <span>
#include <vector>

#include "backends/cpu/study.h"
#include "numeric/float_types.h"
#include "numeric/tensor_core.h"

namespace snapmla {
namespace {

constexpr int kDims = 512, kTokens = 100;  // three whole groups of 32 and a part of one

float rounded(float x) { return numeric::e4m3_to_float(numeric::e4m3_from_float(x)); }

struct Operands {
  std::vector<float> p, latents;  // e4m3 values, [tokens, kRowLanes] and [tokens, kDims]
};

Operands operands(float key_size, std::uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Operands o;
  o.p.resize(kTokens * cpu::kRowLanes);
  for (float& p : o.p) p = rounded(448 * std::exp2(-4 * std::fabs(normal(rng))));
  for (int i = 0; i < kTokens * kDims; ++i) {
    // Every fourth is much smaller: subnormals, and codes whose exponent decides nothing.
    o.latents.push_back(rounded(normal(rng) * (i % 4 == 0 ? 0.01f : key_size)));
  }
  return o;
}

void expect_every_bit(const Operands& o, bool one_level, float start) {
  cpu::RowBlock block;
  block.rows = 2;
  std::vector<float> out(2 * kDims, start);
  const float sigma[2] = {1.0f, 0.25f};
  for (int r = 0; r < 2; ++r) {
    block.visible[r] = kTokens;
    block.rescale[r] = 1.0f;
    block.sigma[r] = sigma[r];
  }
  cpu::tensor_core_values(block, o.p.data(), o.latents.data(), kDims, one_level, out.data(), kDims);
  int different = 0, cut = 0;
  for (int r = 0; r < 2; ++r) {
    for (int d = 0; d < kDims; ++d) {
      float t = one_level ? start / sigma[r] : 0.0f;
      double exact = static_cast<double>(t);
      for (int j = 0; j < kTokens; j += numeric::kTensorCoreGroup) {
        std::vector<float> p, v;
        for (int k = j; k < std::min(kTokens, j + numeric::kTensorCoreGroup); ++k) {
          p.push_back(o.p[static_cast<std::size_t>(k * cpu::kRowLanes + r)]);
          v.push_back(o.latents[static_cast<std::size_t>(k * kDims + d)]);
          exact += static_cast<double>(p.back()) * static_cast<double>(v.back());
        }
        t = numeric::tensor_core_add(t, p, v);
      }
      cut += static_cast<double>(t) != exact;
      const float want = one_level ? t * sigma[r] : start + sigma[r] * t;
      different += out[static_cast<std::size_t>(r * kDims + d)] != want;
    }
  }
  EXPECT_EQ(different, 0);
  EXPECT_GT(cut, kDims) << "nothing is cut off: this shows nothing";
}

TEST(CpuTensorCore, TwoLevelsGiveEveryBitOfTheModel) {
  for (const float size : {0.03f, 1.0f, 100.0f}) {
    SCOPED_TRACE(size);
    expect_every_bit(operands(size, 1), false, 0.0f);
  }
}

TEST(CpuTensorCore, OneLevelGivesEveryBitOfTheModel) {
  for (const float size : {0.03f, 1.0f, 100.0f}) {
    SCOPED_TRACE(size);
    expect_every_bit(operands(size, 2), true, 1000.0f);
  }
}

}  // namespace
}  // namespace snapmla
