// Pages back to rows of f32: un-swizzles, decodes, and keeps the scales apart.
#pragma once

#include <cstdint>

#include "backends/cpu/attention_kernels.h"
#include "backends/cpu/kernels.h"
#include "snapmla/kv_cache.h"

namespace snapmla::cpu {

// One plane row of `width` elements of T to f32: whole 16-byte units stay together in every page
// image.
template <class T, class Decode>
void read_plane_row(const std::uint8_t* plane, PageImage image, std::int64_t width,
                    std::int64_t token, float* to, Decode decode) {
  constexpr std::int64_t kUnit = 16 / sizeof(T);
  const std::int64_t row_bytes = width * static_cast<std::int64_t>(sizeof(T));
  alignas(64) T row[kKvLoraRank];
  for (std::int64_t d = 0; d < width; d += kUnit) {
    const std::int64_t at =
        element_offset(image, row_bytes, token, d * static_cast<std::int64_t>(sizeof(T)));
    __builtin_memcpy(row + d, plane + at, 16);
  }
  decode(row, to, width);
}

// Latent and rope parts of one token, next to each other in `to` [576], as stored (not times the
// scale).
inline void read_key(const KvCacheView& cache, std::int64_t page, std::int64_t token, float* to) {
  const auto bf16 = [](const BFloat16* from, float* out, std::int64_t n) {
    decode_bf16(from, out, n);
  };
  const auto copy = [](const float* from, float* out, std::int64_t n) {
    __builtin_memcpy(out, from, static_cast<std::size_t>(n) * sizeof(float));
  };
  const auto e4m3 = [](const Float8E4M3* from, float* out, std::int64_t n) {
    decode_e4m3(from, 1.0f, out, n);
  };
  float* rope = to + kKvLoraRank;
  switch (cache.format) {
    case KvCacheFormat::kFp8:
      read_plane_row<Float8E4M3>(cache.latent_plane(page), cache.image, kKvLoraRank, token, to,
                                 e4m3);
      read_plane_row<BFloat16>(cache.rope_plane(page), cache.image, kQkRopeHeadDim, token, rope,
                               bf16);
      return;
    case KvCacheFormat::kBf16:
      read_plane_row<BFloat16>(cache.latent_plane(page), cache.image, kKvLoraRank, token, to, bf16);
      read_plane_row<BFloat16>(cache.rope_plane(page), cache.image, kQkRopeHeadDim, token, rope,
                               bf16);
      return;
    case KvCacheFormat::kF32:
      read_plane_row<float>(cache.latent_plane(page), cache.image, kKvLoraRank, token, to, copy);
      read_plane_row<float>(cache.rope_plane(page), cache.image, kQkRopeHeadDim, token, rope, copy);
      return;
  }
}

inline float read_scale(const KvCacheView& cache, std::int64_t page, std::int64_t token) {
  return cache.format == KvCacheFormat::kFp8 ? cache.scale_plane(page)[token] : 1.0f;
}

}  // namespace snapmla::cpu
