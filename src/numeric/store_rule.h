// Other ways to store a token than numeric/scale.h, to measure what each part of the scheme is
// worth. Never used by a cache that serves; `snapmla eval` compares them (docs/quality.md).
//
//   scale   kToken   amax of the latent / 448: the scheme itself
//           kJoint   amax of latent and rope / 448
//           kStatic  one number for all tokens
//           kTile    one per 128 latent elements; kept as codes relative to the token's scale
//   value = code * scale, for latent and rope alike
//
// An FP8 page can hold what stores_in_fp8() says; anything else needs an F32 page that holds the
// values, with the scales beside it.
#pragma once

#include <cmath>
#include <cstdint>

#include "numeric/scale.h"

namespace snapmla::numeric {

inline constexpr int kTileWidth = 128;  // latent elements per scale of kTile

enum class StoreScale : std::uint8_t { kToken, kJoint, kStatic, kTile };

// Mistakes that a kernel could make, planted to see whether an evaluation notices.
enum class StoreFault : std::uint8_t {
  kNone,
  kNeighbour,    // tokens 2k and 2k + 1 of a page have each other's scales
  kBinade,       // the scale that is written is twice the right one
  kRopeUnscaled  // rope is stored as it is, but read times the scale
};

struct StoreRule {
  StoreScale scale = StoreScale::kToken;
  float static_scale = 1.0f;
  bool latent_e4m3 = true;  // false: latents are not rounded
  bool rope_e4m3 = false;   // true: rope is rounded as latents are
  bool rope_bf16 = true;    // false (and not rope_e4m3): rope is not rounded
  float noise = 0.0f;       // latent *= 1 + noise or 1 - noise, by a hash of the element
  StoreFault fault = StoreFault::kNone;
  int fault_every = 1;  // only tokens (kNeighbour: pairs) at the end of every so many have it
};

SNAPMLA_HD bool stores_in_fp8(const StoreRule& r) {
  return r.scale != StoreScale::kTile && r.latent_e4m3 && (r.rope_e4m3 || r.rope_bf16) &&
         r.noise == 0.0f;
}

// The scale that codes are relative to, from the amax of a token's two parts.
SNAPMLA_HD float rule_scale(const StoreRule& r, float latent_amax, float rope_amax,
                            bool all_finite) {
  switch (r.scale) {
    case StoreScale::kStatic:
      return all_finite ? r.static_scale : quiet_nan();
    case StoreScale::kJoint:
      return token_scale(rope_amax > latent_amax ? rope_amax : latent_amax, 0.0f, all_finite,
                         ScaleMode::kAmax);
    case StoreScale::kToken:
    case StoreScale::kTile:
      break;
  }
  return token_scale(latent_amax, rope_amax, all_finite, ScaleMode::kAmax);
}

// +1 or -1, from the bits of a value and its place in the row.
SNAPMLA_HD float sign_of_hash(float value, int d) {
  std::uint32_t h = bits_of(value) * 0x9e3779b1u + static_cast<std::uint32_t>(d) * 0x85ebca77u;
  h ^= h >> 15;
  h *= 0x2c1b3c6du;
  h ^= h >> 12;
  h *= 0x297a2d39u;
  return (h >> 31) != 0 ? 1.0f : -1.0f;
}

// Code of latent element d; tile_amax: the largest magnitude of its tile (kTile only).
SNAPMLA_HD float rule_latent(const StoreRule& r, float value, int d, float scale, float tile_amax) {
  float code = value / scale;
  if (r.scale == StoreScale::kTile) {
    const float tile_scale = token_scale(tile_amax, 0.0f, !is_nan(scale), ScaleMode::kAmax);
    code = value / tile_scale;
    if (r.latent_e4m3) code = e4m3_to_float(e4m3_from_float(code));
    code = code * (tile_scale / scale);
  } else if (r.latent_e4m3) {
    code = e4m3_to_float(e4m3_from_float(code));
  }
  return r.noise == 0.0f ? code : code * (1.0f + r.noise * sign_of_hash(value, d));
}

SNAPMLA_HD float rule_rope(const StoreRule& r, float value, float scale) {
  const float code = r.fault == StoreFault::kRopeUnscaled ? value : value / scale;
  if (r.rope_e4m3) return e4m3_to_float(e4m3_from_float(code));
  if (!r.rope_bf16) return code;
  // kTile is the layout that keeps rope in BF16 as it is, without a scale.
  if (r.scale == StoreScale::kTile) return bf16_to_float(bf16_from_float(value)) / scale;
  return bf16_to_float(bf16_from_float(code));
}

// Whether a token at `token` (0..63) of a page carries the fault.
SNAPMLA_HD bool has_fault(const StoreRule& r, int token) {
  const int unit = r.fault == StoreFault::kNeighbour ? token / 2 : token;
  return r.fault != StoreFault::kNone && unit % r.fault_every == r.fault_every - 1;
}

// The scale as it is written. kNeighbour exchanges scales after both tokens of a pair are there.
SNAPMLA_HD float rule_written_scale(const StoreRule& r, float scale, int token) {
  return r.fault == StoreFault::kBinade && has_fault(r, token) ? 2.0f * scale : scale;
}

}  // namespace snapmla::numeric
