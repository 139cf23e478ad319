// A model of how Hopper's tensor cores add FP8 products: the products of one instruction (32 of
// them) and the accumulator are aligned to the largest exponent among them and cut off, towards
// zero, 13 bits below its leading one (14 significant bits). Long chains lose small terms
// systematically, which is why PV is promoted to f32 once per block. Source: measurements on an
// H200 (docs/notes), DeepSeek-V3 report section 3.3.2.
#pragma once

#include <cmath>
#include <span>

namespace snapmla::numeric {

inline constexpr int kTensorCoreBits = 14;
inline constexpr int kTensorCoreGroup = 32;  // products per instruction along k

// accumulator + sum of products, as the hardware model adds them. products: at most
// kTensorCoreGroup.
inline float tensor_core_add(float accumulator, std::span<const float> products) {
  float largest = std::fabs(accumulator);
  for (float p : products) largest = std::fmax(largest, std::fabs(p));
  if (largest == 0.0f || !std::isfinite(largest)) {
    for (float p : products) accumulator += p;
    return accumulator;
  }
  const double step = std::ldexp(1.0, std::ilogb(largest) - (kTensorCoreBits - 1));
  double sum = std::trunc(accumulator / step);
  for (float p : products) sum += std::trunc(p / step);
  return static_cast<float>(sum * step);
}

}  // namespace snapmla::numeric
