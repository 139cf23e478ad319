// numeric/tensor_core.h against the tensor core itself, bit for bit.
#include "numeric/tensor_core.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cuda/cuda_test.h"
#include "gpu/tensor_core_probe.h"
#include "numeric/float_types.h"

namespace snapmla::test {
namespace {

class CudaSmallTensorCore : public CudaTest {};

struct Data {
  std::string name;
  std::function<float(int)> a, b;  // the i-th value, rounded to e4m3
};

std::vector<float> rounded(const std::function<float(int)>& value, int count,
                           std::vector<std::uint8_t>& codes) {
  std::vector<float> values;
  for (int i = 0; i < count; ++i) {
    codes.push_back(numeric::e4m3_from_float(value(i)).bits);
    values.push_back(numeric::e4m3_to_float(Float8E4M3{codes.back()}));
  }
  return values;
}

TEST_F(CudaSmallTensorCore, TheModelGivesEveryBit) {
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> code(0, 125);  // neither NaN nor its neighbour
  const auto any = [&](bool positive) {
    const float x = numeric::e4m3_to_float(Float8E4M3{static_cast<std::uint8_t>(code(rng))});
    return positive || normal(rng) > 0 ? x : -x;
  };
  const std::vector<Data> kinds = {
      {"queries and keys", [&](int) { return 128 * normal(rng); },
       [&](int) { return 128 * normal(rng); }},
      {"P and positive latents", [&](int) { return 448 * std::exp2(-2 * std::fabs(normal(rng))); },
       [&](int) { return 250 + 60 * normal(rng); }},
      {"P with one large weight",
       [&](int i) { return i % 128 == 5 ? 448 : 0.1f * std::fabs(normal(rng)); },
       [&](int) { return 128 * normal(rng); }},
      {"any code", [&](int) { return any(false); }, [&](int) { return any(false); }},
      {"any positive code", [&](int) { return any(true); }, [&](int) { return any(true); }},
      {"subnormals", [&](int) { return 0.01f * normal(rng); }, [&](int) { return any(false); }},
  };
  for (const auto form : {gpu::ProbeForm::kShared, gpu::ProbeForm::kRegisters}) {
    for (const Data& data : kinds) {
      SCOPED_TRACE(data.name + (form == gpu::ProbeForm::kShared ? ", shared" : ", registers"));
      constexpr int kRow = gpu::kProbeSteps * gpu::kProbeK;
      std::vector<std::uint8_t> a_codes, b_codes;
      const auto a = rounded(data.a, gpu::kProbeM * kRow, a_codes);
      const auto b = rounded(data.b, gpu::kProbeN * kRow, b_codes);
      const auto got = gpu::probe_tensor_core(form, a_codes, b_codes);
      int different = 0, rounded_sums = 0;
      for (int m = 0; m < gpu::kProbeM; ++m) {
        for (int n = 0; n < gpu::kProbeN; ++n) {
          float sum = 0;
          double exact = 0;
          for (int step = 0; step < gpu::kProbeSteps; ++step) {
            const auto at = [&](const std::vector<float>& x, int row) {
              return std::span(x).subspan(
                  static_cast<std::size_t>(row * kRow + step * gpu::kProbeK), gpu::kProbeK);
            };
            const auto x = at(a, m), y = at(b, n);
            for (std::size_t k = 0; k < x.size(); ++k)
              exact += static_cast<double>(x[k]) * static_cast<double>(y[k]);
            sum = numeric::tensor_core_add(sum, x, y);
            const float hardware =
                got[static_cast<std::size_t>((step * gpu::kProbeM + m) * gpu::kProbeN + n)];
            different +=
                std::bit_cast<std::uint32_t>(hardware) != std::bit_cast<std::uint32_t>(sum);
            rounded_sums += static_cast<double>(sum) != exact;
          }
        }
      }
      EXPECT_EQ(different, 0);
      EXPECT_GT(rounded_sums, 1000) << "nothing is cut off: this shows nothing";
    }
  }
}

}  // namespace
}  // namespace snapmla::test
