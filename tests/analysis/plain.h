// The schemes written out once more, in double and element by element, and random rows for them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <tuple>
#include <vector>

#include "analysis/schemes.h"

namespace snapmla::analysis::plain {

inline constexpr int kLatent = 512, kRope = 64, kPage = 64;

struct Text {
  std::int64_t tokens = 0;
  std::vector<float> latent, rope;  // [tokens, 512], [tokens, 64]
  mutable std::map<std::tuple<bool, std::int64_t, std::int64_t, int, int>, double> largest;  // amax
  float l(std::int64_t t, int c) const { return latent[static_cast<std::size_t>(t * kLatent + c)]; }
  float r(std::int64_t t, int c) const { return rope[static_cast<std::size_t>(t * kRope + c)]; }
};

// Normal elements; tokens and channels of unequal size, some far out, RoPE larger than latents.
inline Text text(std::int64_t tokens, unsigned seed, float spread = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Text x;
  x.tokens = tokens;
  std::vector<float> channel(kLatent + kRope);
  for (float& c : channel) c = std::exp2(spread * normal(random));
  channel[17] *= 16;
  channel[kLatent + 5] *= 8;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float size = std::exp2(spread * normal(random));
    for (int c = 0; c < kLatent; ++c)
      x.latent.push_back(size * channel[static_cast<std::size_t>(c)] * normal(random));
    for (int c = 0; c < kRope; ++c)
      x.rope.push_back(5 * channel[static_cast<std::size_t>(kLatent + c)] * normal(random));
  }
  return x;
}

// The nearest value of e4m3 (ties to the even code), found by trying all of them.
inline double e4m3(double x) {
  if (std::isnan(x)) return x;
  double best = 0, distance = 1e300;
  for (int code = 0; code < 127; ++code) {
    const int exponent = code >> 3, fraction = code & 7;
    const double value =
        exponent == 0 ? fraction / 512.0 : (1 + fraction / 8.0) * std::exp2(exponent - 7);
    const double d = std::fabs(std::fabs(x) - value);
    if (d < distance || (d == distance && code % 2 == 0)) {
      best = value;
      distance = d;
    }
  }
  return std::copysign(best, x);
}

// To 8 bits of significand, ties to even; normal numbers only.
inline double bf16(double x) {
  if (x == 0) return x;
  const double unit = std::exp2(std::floor(std::log2(std::fabs(x))) - 7);
  return std::nearbyint(x / unit) * unit;
}

// Largest magnitude over tokens [t0, t1) and channels [c0, c1) of one part.
inline double amax(const Text& x, bool latent, std::int64_t t0, std::int64_t t1, int c0, int c1) {
  const auto [at, fresh] = x.largest.try_emplace({latent, t0, t1, c0, c1}, 0.0);
  for (std::int64_t t = t0; fresh && t < std::min(t1, x.tokens); ++t)
    for (int c = c0; c < c1; ++c)
      at->second =
          std::max(at->second, std::fabs(static_cast<double>(latent ? x.l(t, c) : x.r(t, c))));
  return at->second;
}

// The scale of element (t, c), in f32 as the cache has it; 0 stands for "not e4m3".
inline double scale(const Text& x, Scheme scheme, bool latent, std::int64_t t, int c) {
  const int width = latent ? kLatent : kRope;
  const auto of = [&](double a) {
    return a == 0 ? 1.0 : static_cast<double>(static_cast<float>(a) / 448.0f);
  };
  const std::int64_t page = t / kPage * kPage, all = x.tokens;
  const int tile = c / 128 * 128, tile_end = std::min(width, tile + 128);
  switch (scheme) {
    case Scheme::kTensorOne:
      return 1;
    case Scheme::kTensor:
      return of(amax(x, latent, 0, all, 0, width));
    case Scheme::kTensorJoint:
      return of(std::max(amax(x, true, 0, all, 0, kLatent), amax(x, false, 0, all, 0, kRope)));
    case Scheme::kChannel:
      return of(amax(x, latent, 0, all, c, c + 1));
    case Scheme::kBlock:
      return of(amax(x, latent, page, page + kPage, tile, tile_end));
    case Scheme::kTile:
      return of(amax(x, latent, t, t + 1, tile, tile_end));
    case Scheme::kToken:
      return of(amax(x, latent, t, t + 1, 0, width));
    case Scheme::kTokenJoint:
      return of(std::max(amax(x, true, t, t + 1, 0, kLatent), amax(x, false, t, t + 1, 0, kRope)));
    default:
      return 0;
  }
}

inline double stored(const Text& x, Scheme scheme, bool latent, std::int64_t t, int c) {
  const double value = latent ? x.l(t, c) : x.r(t, c);
  if (scheme == Scheme::kBf16) return bf16(value);
  // Quotients and products in f32, as the cache computes them.
  if (scheme == Scheme::kRopeOverScale) {
    const auto s = static_cast<float>(scale(x, Scheme::kToken, true, t, 0));
    return static_cast<float>(bf16(static_cast<float>(value) / s)) * s;
  }
  const auto s = static_cast<float>(scale(x, scheme, latent, t, c));
  return static_cast<float>(e4m3(static_cast<float>(value) / s)) * s;
}

}  // namespace snapmla::analysis::plain
