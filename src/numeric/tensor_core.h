// A model of how Hopper's tensor cores add FP8 products, bit for bit
// (tests/cuda/tensor_core_test.cu holds it to an H200's wgmma):
//
//   e_k = exponent(a_k) + exponent(b_k)        of the operands, subnormals -6: not of the product
//   E   = max(e_k of all products that are not 0, exponent(accumulator))
//   S   = sum of accumulator and products, each cut towards zero to multiples of 2^(E - 13)
//   accumulator' = S cut towards zero to 13 bits behind its leading one
//
// for the 32 products of one instruction at once. Long chains lose small terms systematically,
// which is why PV is promoted to f32 once per block. The same rule is reported for the H100 by Xie
// et al., "MMA-Sim" (arXiv 2511.10909); DeepSeek-V3 report, section 3.3.2, has the consequences.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <span>

namespace snapmla::numeric {

inline constexpr int kTensorCoreBits = 14;
inline constexpr int kTensorCoreGroup = 32;  // products per instruction along k

// Exponent of an e4m3 value that is not 0, as the tensor core sees it.
inline int e4m3_exponent(float value) {
  const int e = std::ilogb(value);
  return e < -6 ? -6 : e;
}

// Cut towards zero to kTensorCoreBits significant bits.
inline float tensor_core_cut(float x) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) &
                              ~((1u << (24 - kTensorCoreBits)) - 1));
}

// accumulator + sum of a_k b_k. a, b: e4m3 values, as many of each, at most kTensorCoreGroup.
inline float tensor_core_add(float accumulator, std::span<const float> a,
                             std::span<const float> b) {
  constexpr int kNone = -1000;
  int largest = accumulator != 0.0f && std::isfinite(accumulator) ? std::ilogb(accumulator) : kNone;
  float plain = accumulator;
  for (std::size_t k = 0; k < a.size(); ++k) {
    plain += a[k] * b[k];
    if (a[k] != 0.0f && b[k] != 0.0f && std::isfinite(plain)) {
      const int e = e4m3_exponent(a[k]) + e4m3_exponent(b[k]);
      if (e > largest) largest = e;
    }
  }
  if (!std::isfinite(plain) || largest == kNone) return plain;
  const double step = std::ldexp(1.0, largest - (kTensorCoreBits - 1));
  double sum = std::trunc(accumulator / step);
  for (std::size_t k = 0; k < a.size(); ++k)
    sum += std::trunc(static_cast<double>(a[k]) * static_cast<double>(b[k]) / step);
  return tensor_core_cut(static_cast<float>(sum * step));
}

}  // namespace snapmla::numeric
