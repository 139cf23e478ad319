// A model of how Hopper's tensor cores add FP8 products, bit for bit
// (tests/cuda/tensor_core_test.cpp holds it to an H200's wgmma):
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

#include <cassert>
#include <cmath>
#include <cstdint>
#include <span>

#include "numeric/float_types.h"
#include "numeric/hd.h"

namespace snapmla::numeric {

inline constexpr int kTensorCoreBits = 14;
inline constexpr int kTensorCoreGroup = 32;  // products per instruction along k

// Exponent of an e4m3 value that is not 0, as the tensor core sees it.
inline int e4m3_exponent(float value) {
  const int e = std::ilogb(value);
  return e < -6 ? -6 : e;
}

// 2 to that exponent, 0 for 0.
SNAPMLA_HD float e4m3_power(float x) {
  const float power = float_of(bits_of(x) & 0x7f800000u);
  return x == 0.0f ? 0.0f : power < 0x1p-6f ? 0x1p-6f : power;
}

// Cut towards zero to kTensorCoreBits significant bits.
SNAPMLA_HD float tensor_core_cut(float x) {
  return float_of(bits_of(x) & ~((1u << (24 - kTensorCoreBits)) - 1));
}

// 2^(E - 13) and its reciprocal, for the largest of the accumulator's magnitude and the products of
// e4m3_power. Exponents near the ends of f32 do not occur with operands of at most 448, except for
// an accumulator that has faded to nothing: no step is below 2^-100.
struct TensorCoreStep {
  float step, inverse;
};
SNAPMLA_HD TensorCoreStep tensor_core_step(float largest) {
  const std::uint32_t low = 40u << 23, high = 240u << 23, e = bits_of(largest) & 0x7f800000u;
  const std::uint32_t s = (e < low    ? low
                           : e > high ? high
                                      : e) -
                          (static_cast<std::uint32_t>(kTensorCoreBits - 1) << 23);
  return {float_of(s), float_of((254u << 23) - s)};
}

// The e4m3 value that x is up to the rounding of a few f32 operations, or x: what is left of a code
// after f32(code * scale) / scale, one ulp below a power of two, has the wrong exponent.
SNAPMLA_HD float snap_to_e4m3(float x) {
  const float size = float_of(bits_of(x) & 0x7fffffffu);
  float code = float_of((bits_of(size) + 0x80000u) & 0xfff00000u);
  if (size < 0x1p-6f) code = (size + 0x1.8p14f) - 0x1.8p14f;  // multiples of 2^-9
  const float off = code - size;
  const bool close = (off < 0.0f ? -off : off) <= 0x1p-21f * size;
  return close ? float_of(bits_of(code) | (bits_of(x) & 0x80000000u)) : x;
}

// accumulator + sum of a_k b_k. a, b: e4m3 values, as many of each, at most kTensorCoreGroup. Where
// something is not finite, the plain sum.
inline float tensor_core_add(float accumulator, std::span<const float> a,
                             std::span<const float> b) {
  assert(a.size() == b.size() && a.size() <= kTensorCoreGroup);
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
