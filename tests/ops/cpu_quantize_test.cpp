// The cpu backend's vector code of quantisation against the scalar rules, bit for bit, with every
// instruction set down to the fallback.
#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cmath>
#include <random>
#include <vector>

#include "backends/cpu/quantize_kernels.h"
#include "numeric/scale.h"

namespace snapmla {
namespace {

constexpr std::int64_t kWidth = 512;

// Every bf16, and 2^19 f32 of random bits: all exponents, NaN payloads, subnormals, ties.
std::vector<float> many_values() {
  std::vector<float> values;
  for (std::uint32_t i = 0; i < 65536; ++i) values.push_back(numeric::float_of(i << 16));
  std::mt19937 gen(7);
  for (int i = 0; i < 1 << 19; ++i)
    values.push_back(numeric::float_of(static_cast<std::uint32_t>(gen())));
  // Around e4m3's range, where every code and every tie between two of them is met.
  for (std::uint32_t i = 0; i < 1 << 16; ++i)
    values.push_back(
        numeric::float_of(0x3a000000u + (i << 12) + static_cast<std::uint32_t>(gen() % 3) - 1));
  return values;
}

const std::vector<float>& scales() {
  static const std::vector<float> list = {
      1.0f, 1.0f / 448, 0x1p-60f, 0x1.234568p-7f, 3.3f, 0x1p100f, numeric::quiet_nan()};
  return list;
}

// Restores the processor's own choice at the end of a test.
class CpuQuantize : public testing::Test {
 protected:
  ~CpuQuantize() override { use(0); }
  static void use(std::int64_t targets) {
    hwy::SetSupportedTargetsForTest(targets);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  template <class Fn>
  static void on_every_target(const Fn& fn) {
    for (std::int64_t targets = hwy::SupportedTargets(); targets != 0; targets &= targets - 1) {
      use(targets & -targets);
      fn();
      if (testing::Test::HasFatalFailure()) return;
      use(0);
    }
  }
};

TEST_F(CpuQuantize, F32RowsToE4m3AndBf16) {
  const std::vector<float> values = many_values();
  ASSERT_EQ(values.size() % kWidth, 0u);
  on_every_target([&] {
    for (const float scale : scales()) {
      for (std::size_t at = 0; at < values.size(); at += kWidth) {
        Float8E4M3 codes[kWidth];
        BFloat16 halves[kWidth];
        cpu::encode_e4m3(&values[at], DType::kF32, kWidth, scale, codes);
        cpu::encode_bf16(&values[at], DType::kF32, kWidth, scale, halves);
        for (std::size_t i = 0; i < kWidth; ++i) {
          const float x = values[at + i];
          ASSERT_EQ(codes[i].bits, numeric::quantize_latent(x, scale).bits) << x << " / " << scale;
          ASSERT_EQ(halves[i].bits, numeric::quantize_rope(x, scale).bits) << x << " / " << scale;
        }
      }
    }
  });
}

TEST_F(CpuQuantize, Bf16RowsToE4m3Bf16AndF32) {
  on_every_target([&] {
    for (const float scale : scales()) {
      for (std::uint32_t at = 0; at < 65536; at += kWidth) {
        BFloat16 from[kWidth], halves[kWidth];
        for (std::uint32_t i = 0; i < kWidth; ++i)
          from[i].bits = static_cast<std::uint16_t>(at + i);
        Float8E4M3 codes[kWidth];
        float wide[kWidth];
        cpu::encode_e4m3(from, DType::kBF16, kWidth, scale, codes);
        cpu::encode_bf16(from, DType::kBF16, kWidth, scale, halves);
        cpu::encode_f32(from, DType::kBF16, kWidth, wide);
        for (std::size_t i = 0; i < kWidth; ++i) {
          const float x = numeric::bf16_to_float(from[i]);
          ASSERT_EQ(codes[i].bits, numeric::quantize_latent(x, scale).bits) << x << " / " << scale;
          ASSERT_EQ(halves[i].bits, numeric::quantize_rope(x, scale).bits) << x << " / " << scale;
          ASSERT_EQ(numeric::bits_of(wide[i]), (at + i) << 16);
        }
      }
    }
  });
}

// One element decides the scale, wherever in a row it stands; what is not finite makes it NaN.
TEST_F(CpuQuantize, ScaleOfARow) {
  on_every_target([&] {
    for (const float value : {0.0f, -0.0f, 1e-38f, -3.5f, 1e30f, 3.4e38f, -HUGE_VALF, NAN}) {
      for (const ScaleMode mode : {ScaleMode::kAmax, ScaleMode::kPow2}) {
        for (std::size_t place = 0; place < 576; place += 5) {
          std::vector<float> row(576, 0.0f);
          row[3] = -1e-3f;
          row[520] = 2e-4f;
          row[place] = value;
          std::vector<BFloat16> half(576);
          for (std::size_t i = 0; i < 576; ++i) half[i] = numeric::bf16_from_float(row[i]);
          for (const bool bf16 : {false, true}) {
            float latent = 0, rope = 0;
            bool finite = true;
            for (std::size_t i = 0; i < 576; ++i) {
              const float x = bf16 ? numeric::bf16_to_float(half[i]) : row[i];
              finite = finite && std::isfinite(x);
              float& amax = i < 512 ? latent : rope;
              amax = std::fmax(amax, std::fabs(x));
            }
            const float want = numeric::token_scale(latent, rope, finite, mode);
            const float got =
                bf16 ? cpu::row_scale(half.data(), DType::kBF16, half.data() + 512, DType::kBF16,
                                      mode)
                     : cpu::row_scale(row.data(), DType::kF32, row.data() + 512, DType::kF32, mode);
            ASSERT_EQ(numeric::bits_of(got), numeric::bits_of(want)) << value << " at " << place;
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace snapmla
