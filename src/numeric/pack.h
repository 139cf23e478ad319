// Conversions of several elements at once: one instruction for two on the device, the same bits on
// the host.
#pragma once

#include "numeric/float_types.h"

namespace snapmla::numeric {

// e4m3(a) in the lowest byte, e4m3(d) in the highest.
SNAPMLA_HD std::uint32_t pack_e4m3(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__)
  std::uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return static_cast<std::uint32_t>(low) | (static_cast<std::uint32_t>(high) << 16);
#else
  return static_cast<std::uint32_t>(e4m3_from_float(a).bits) |
         static_cast<std::uint32_t>(e4m3_from_float(b).bits) << 8 |
         static_cast<std::uint32_t>(e4m3_from_float(c).bits) << 16 |
         static_cast<std::uint32_t>(e4m3_from_float(d).bits) << 24;
#endif
}

// bf16(a) in the lower half, bf16(b) in the upper.
SNAPMLA_HD std::uint32_t pack_bf16(float a, float b) {
#if defined(__CUDA_ARCH__)
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
  return packed;
#else
  return static_cast<std::uint32_t>(bf16_from_float(a).bits) |
         static_cast<std::uint32_t>(bf16_from_float(b).bits) << 16;
#endif
}

SNAPMLA_HD float low_bf16(std::uint32_t packed) { return float_of(packed << 16); }
SNAPMLA_HD float high_bf16(std::uint32_t packed) { return float_of(packed & 0xffff0000u); }

}  // namespace snapmla::numeric
