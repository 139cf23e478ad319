// The per-token scale of latent and RoPE parts, for keys and for queries alike.
//
//   a = max|latent|, r = max|rope|
//   s = NaN                              when any element is not finite
//   s = 1                                when a = 0
//   s = max(a / 448, r * 2^-40, 2^-60)   otherwise
//   code = e4m3(clamp(latent / s)), rope' = bf16(rope / s)
//
// The second term keeps rope / s finite in bf16 and the score products finite in f32; the third
// keeps s a normal number. scale ALWAYS means "multiply to dequantise". Source: SnapMLA, RoPE-aware
// per-token quantization; the lower bounds are this project's.
#pragma once

#include "numeric/float_types.h"
#include "snapmla/kv_cache.h"

namespace snapmla::numeric {

// The smallest power of two >= s, for normal positive s.
SNAPMLA_HD float round_up_to_pow2(float s) {
  const std::uint32_t bits = bits_of(s);
  return (bits & 0x007fffffu) == 0 ? s : float_of((bits & 0x7f800000u) + 0x00800000u);
}

SNAPMLA_HD float token_scale(float latent_amax, float rope_amax, bool all_finite, ScaleMode mode) {
  if (!all_finite) return quiet_nan();
  if (latent_amax == 0.0f) return 1.0f;
  float s = latent_amax / kE4M3Max;
  const float from_rope = rope_amax * 0x1p-40f;
  if (from_rope > s) s = from_rope;
  if (s < 0x1p-60f) s = 0x1p-60f;
  return mode == ScaleMode::kPow2 ? round_up_to_pow2(s) : s;
}

SNAPMLA_HD Float8E4M3 quantize_latent(float value, float scale) {
  return e4m3_from_float(value / scale);
}

SNAPMLA_HD BFloat16 quantize_rope(float value, float scale) {
  return bf16_from_float(value / scale);
}

}  // namespace snapmla::numeric
