// bfloat16 and FP8 e4m3: conversions that agree bit for bit with the CUDA toolkit's.
//   bf16_from_float  round to nearest even; NaN becomes 0x7fff (as __float2bfloat16_rn)
//   e4m3_from_float  clamp to +-448, round to nearest even; NaN becomes 0x7f (as cvt.rn.satfinite)
#pragma once

#include <cstdint>
#include <cstring>

#include "numeric/hd.h"
#include "snapmla/dtype.h"

namespace snapmla::numeric {

inline constexpr float kE4M3Max = 448.0f;

SNAPMLA_HD std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

SNAPMLA_HD float float_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

SNAPMLA_HD bool is_nan(float x) { return (bits_of(x) & 0x7fffffffu) > 0x7f800000u; }
SNAPMLA_HD bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }
SNAPMLA_HD float quiet_nan() { return float_of(0x7fc00000u); }
SNAPMLA_HD float negative_infinity() { return float_of(0xff800000u); }

SNAPMLA_HD float bf16_to_float(BFloat16 x) {
  return float_of(static_cast<std::uint32_t>(x.bits) << 16);
}

SNAPMLA_HD BFloat16 bf16_from_float(float x) {
  const std::uint32_t bits = bits_of(x);
  if (is_nan(x)) return BFloat16{0x7fff};
  const std::uint32_t round = 0x7fffu + ((bits >> 16) & 1u);
  return BFloat16{static_cast<std::uint16_t>((bits + round) >> 16)};
}

SNAPMLA_HD float e4m3_to_float(Float8E4M3 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x80u) << 24;
  const std::uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return float_of(sign | 0x7fc00000u);
  if (magnitude < 8u) {  // subnormal: multiples of 2^-9
    const float value = static_cast<float>(magnitude) * 0x1p-9f;
    return sign ? -value : value;
  }
  return float_of(sign | ((magnitude + (120u << 3)) << 20));
}

SNAPMLA_HD Float8E4M3 e4m3_from_float(float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t sign = (bits >> 24) & 0x80u;
  std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return Float8E4M3{0x7f};
  const std::uint32_t largest = 0x43e00000u;  // 448
  if (magnitude > largest) magnitude = largest;
  std::uint32_t code;
  if (magnitude < 0x3c800000u) {  // below 2^-6: adding 2^14 rounds to a multiple of 2^-9
    code = bits_of(float_of(magnitude) + 16384.0f) & 0xffu;
  } else {
    code = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  }
  return Float8E4M3{static_cast<std::uint8_t>(sign | code)};
}

}  // namespace snapmla::numeric
