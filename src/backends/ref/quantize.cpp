// Per-token quantisation of queries and keys, and reading pages back.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "backends/ref/ref_ops.h"
#include "numeric/scale.h"
#include "ops/element.h"

namespace snapmla::ref {
namespace {

float scale_of(const TensorView& latent, std::int64_t latent_at, const TensorView& rope,
               std::int64_t rope_at, ScaleMode mode) {
  float latent_amax = 0, rope_amax = 0;
  bool finite = true;
  const auto visit = [&finite](const TensorView& t, std::int64_t at, std::int64_t width,
                               float& amax) {
    for (std::int64_t d = 0; d < width; ++d) {
      const float value = ops::load(t.raw(), t.dtype(), at + d);
      finite = finite && numeric::is_finite(value);
      amax = std::max(amax, std::fabs(value));
    }
  };
  visit(latent, latent_at, kKvLoraRank, latent_amax);
  visit(rope, rope_at, kQkRopeHeadDim, rope_amax);
  return numeric::token_scale(latent_amax, rope_amax, finite, mode);
}

std::int64_t offset(const TensorView& t, std::int64_t b, std::int64_t s, std::int64_t h) {
  return b * t.stride(0) + s * t.stride(1) + h * t.stride(2);
}

template <class T>
void put(std::uint8_t* plane, const KvCacheView& cache, std::int64_t row_elements,
         std::int64_t token, std::int64_t d, T value) {
  const auto size = static_cast<std::int64_t>(sizeof(T));
  std::memcpy(plane + element_offset(cache.image, row_elements * size, token, d * size), &value,
              sizeof(T));
}

float get(const std::uint8_t* plane, const KvCacheView& cache, DType type,
          std::int64_t row_elements, std::int64_t token, std::int64_t d) {
  const auto size = static_cast<std::int64_t>(size_of(type));
  return ops::load(plane + element_offset(cache.image, row_elements * size, token, d * size), type,
                   0);
}

void append_row(const KvCacheView& cache, std::uint8_t* plane, DType type, const TensorView& from,
                std::int64_t row, std::int64_t width, std::int64_t token, float scale) {
  for (std::int64_t d = 0; d < width; ++d) {
    const float value = ops::load(from.raw(), from.dtype(), row * from.stride(0) + d);
    if (type == DType::kE4M3) {
      put(plane, cache, width, token, d, numeric::quantize_latent(value, scale));
    } else if (type == DType::kBF16) {
      put(plane, cache, width, token, d, numeric::quantize_rope(value, scale));
    } else {
      put(plane, cache, width, token, d, value);
    }
  }
}

}  // namespace

void quantize_q(const QuantizeQArgs& a) {
  for (std::int64_t b = 0; b < a.q_latent.dim(0); ++b) {
    for (std::int64_t s = 0; s < a.q_latent.dim(1); ++s) {
      for (std::int64_t h = 0; h < a.q_latent.dim(2); ++h) {
        const std::int64_t latent = offset(a.q_latent, b, s, h), rope = offset(a.q_rope, b, s, h);
        const float scale = scale_of(a.q_latent, latent, a.q_rope, rope, a.scale_mode);
        a.q_scale_out.row<float>(b, s)[h] = scale;
        for (std::int64_t d = 0; d < kKvLoraRank; ++d) {
          a.q_latent_out.row<Float8E4M3>(b, s, h)[d] = numeric::quantize_latent(
              ops::load(a.q_latent.raw(), a.q_latent.dtype(), latent + d), scale);
        }
        for (std::int64_t d = 0; d < kQkRopeHeadDim; ++d) {
          a.q_rope_out.row<BFloat16>(b, s, h)[d] =
              numeric::quantize_rope(ops::load(a.q_rope.raw(), a.q_rope.dtype(), rope + d), scale);
        }
      }
    }
  }
}

void append_kv(const AppendKvArgs& a) {
  const KvCacheView& cache = a.cache;
  const bool fp8 = cache.format == KvCacheFormat::kFp8, f32 = cache.format == KvCacheFormat::kF32;
  for (std::int64_t t = 0; t < a.latent.dim(0); ++t) {
    const std::int64_t slot = a.slot_mapping.data<std::int64_t>()[t];
    if (slot < 0) continue;
    const std::int64_t page = slot / kPageSize, token = slot % kPageSize;
    const float scale =
        fp8 ? scale_of(a.latent, t * a.latent.stride(0), a.rope, t * a.rope.stride(0), a.scale_mode)
            : 1.0f;
    append_row(cache, cache.latent_plane(page),
               fp8   ? DType::kE4M3
               : f32 ? DType::kF32
                     : DType::kBF16,
               a.latent, t, kKvLoraRank, token, scale);
    append_row(cache, cache.rope_plane(page), f32 ? DType::kF32 : DType::kBF16, a.rope, t,
               kQkRopeHeadDim, token, scale);
    if (fp8) cache.scale_plane(page)[token] = scale;
  }
}

void fetch_dequant(const FetchDequantArgs& a) {
  const KvCacheView& cache = a.cache;
  const bool fp8 = cache.format == KvCacheFormat::kFp8, f32 = cache.format == KvCacheFormat::kF32;
  const DType latent_type = fp8 ? DType::kE4M3 : f32 ? DType::kF32 : DType::kBF16;
  const DType rope_type = f32 ? DType::kF32 : DType::kBF16;
  for (std::int64_t t = a.token_begin; t < a.token_end; ++t) {
    const std::int64_t page = a.block_table.data<std::int32_t>()[t / kPageSize],
                       token = t % kPageSize;
    const float scale = fp8 ? cache.scale_plane(page)[token] : 1.0f;
    const std::int64_t row = t - a.token_begin;
    for (std::int64_t d = 0; d < kKvLoraRank; ++d) {
      const float value = get(cache.latent_plane(page), cache, latent_type, kKvLoraRank, token, d);
      ops::store(a.latent_out.raw(), a.latent_out.dtype(), row * a.latent_out.stride(0) + d,
                 value * scale);
    }
    for (std::int64_t d = 0; d < kQkRopeHeadDim; ++d) {
      const float value = get(cache.rope_plane(page), cache, rope_type, kQkRopeHeadDim, token, d);
      ops::store(a.rope_out.raw(), a.rope_out.dtype(), row * a.rope_out.stride(0) + d,
                 value * scale);
    }
  }
}

}  // namespace snapmla::ref
