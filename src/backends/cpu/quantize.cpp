// Quantisation of queries and keys, and reading token ranges back, in strips of rows.
#include <algorithm>
#include <cstring>

#include "backends/cpu/attention_kernels.h"
#include "backends/cpu/cpu_ops.h"
#include "backends/cpu/quantize_kernels.h"
#include "ops/element.h"

namespace snapmla::cpu {
namespace {

constexpr std::int64_t kStrip = 32;

// A row of `bytes` to its place in a plane: units of 16 bytes stay together in every image.
void store_row(const void* row, std::int64_t bytes, PageImage image, std::int64_t token,
               std::uint8_t* plane) {
  for (std::int64_t at = 0; at < bytes; at += 16) {
    std::memcpy(plane + element_offset(image, bytes, token, at),
                static_cast<const std::uint8_t*>(row) + at, 16);
  }
}

void append_token(const AppendKvArgs& a, std::int64_t t, std::int64_t slot) {
  const KvCacheView& cache = a.cache;
  const std::int64_t page = slot / kPageSize, token = slot % kPageSize;
  const void* latent = ops::element_ptr(a.latent, t * a.latent.stride(0));
  const void* rope = ops::element_ptr(a.rope, t * a.rope.stride(0));
  const DType latent_type = a.latent.dtype(), rope_type = a.rope.dtype();
  std::uint8_t *latent_plane = cache.latent_plane(page), *rope_plane = cache.rope_plane(page);
  if (cache.format == KvCacheFormat::kF32) {
    float row[kKvLoraRank];
    encode_f32(latent, latent_type, kKvLoraRank, row);
    store_row(row, kKvLoraRank * 4, cache.image, token, latent_plane);
    encode_f32(rope, rope_type, kQkRopeHeadDim, row);
    store_row(row, kQkRopeHeadDim * 4, cache.image, token, rope_plane);
    return;
  }
  float scale = 1.0f;
  BFloat16 row[kKvLoraRank];
  if (cache.format == KvCacheFormat::kFp8) {
    scale = row_scale(latent, latent_type, rope, rope_type, a.scale_mode);
    cache.scale_plane(page)[token] = scale;
    Float8E4M3 codes[kKvLoraRank];
    encode_e4m3(latent, latent_type, kKvLoraRank, scale, codes);
    store_row(codes, kKvLoraRank, cache.image, token, latent_plane);
  } else {
    encode_bf16(latent, latent_type, kKvLoraRank, scale, row);
    store_row(row, kKvLoraRank * 2, cache.image, token, latent_plane);
  }
  encode_bf16(rope, rope_type, kQkRopeHeadDim, scale, row);
  store_row(row, kQkRopeHeadDim * 2, cache.image, token, rope_plane);
}

// from * scale to a row of f32 or bf16.
void write_row(const float* from, std::int64_t width, float scale, const TensorView& to,
               std::int64_t row) {
  if (to.dtype() == DType::kF32) {
    float* at = to.row<float>(row);
    for (std::int64_t d = 0; d < width; ++d) at[d] = from[d] * scale;
  } else {
    BFloat16* at = to.row<BFloat16>(row);
    for (std::int64_t d = 0; d < width; ++d) at[d] = numeric::bf16_from_float(from[d] * scale);
  }
}

// Calls fn(i) for i in [0, rows): in parallel where there is more than one strip.
template <class Fn>
void for_rows(ThreadPool& pool, std::int64_t rows, const Fn& fn) {
  pool.parallel_for((rows + kStrip - 1) / kStrip, [&](std::int64_t strip) {
    const std::int64_t end = std::min(rows, (strip + 1) * kStrip);
    for (std::int64_t i = strip * kStrip; i < end; ++i) fn(i);
  });
}

}  // namespace

void quantize_q(ThreadPool& pool, const QuantizeQArgs& a) {
  const std::int64_t seqlen = a.q_latent.dim(1), heads = a.q_latent.dim(2);
  for_rows(pool, a.q_latent.dim(0) * seqlen * heads, [&](std::int64_t i) {
    const std::int64_t b = i / heads / seqlen, s = i / heads % seqlen, h = i % heads;
    const auto at = [&](const TensorView& t) {
      return ops::element_ptr(t, b * t.stride(0) + s * t.stride(1) + h * t.stride(2));
    };
    const void *latent = at(a.q_latent), *rope = at(a.q_rope);
    const DType latent_type = a.q_latent.dtype(), rope_type = a.q_rope.dtype();
    const float scale = row_scale(latent, latent_type, rope, rope_type, a.scale_mode);
    a.q_scale_out.row<float>(b, s, h)[0] = scale;
    encode_e4m3(latent, latent_type, kKvLoraRank, scale, a.q_latent_out.row<Float8E4M3>(b, s, h));
    encode_bf16(rope, rope_type, kQkRopeHeadDim, scale, a.q_rope_out.row<BFloat16>(b, s, h));
  });
}

void append_kv(ThreadPool& pool, const AppendKvArgs& a) {
  for_rows(pool, a.latent.dim(0), [&](std::int64_t t) {
    const std::int64_t slot = a.slot_mapping.data<std::int64_t>()[t];
    if (slot >= 0) append_token(a, t, slot);
  });
}

void fetch_dequant(ThreadPool& pool, const FetchDequantArgs& a) {
  const float unscale = latent_unscale(a.cache.format);
  for_rows(pool, a.token_end - a.token_begin, [&](std::int64_t row) {
    float key[kKeyWidth];
    const std::int64_t t = a.token_begin + row, token = t % kPageSize;
    const std::int64_t page = a.block_table.data<std::int32_t>()[t / kPageSize];
    load_keys(a.cache, page, token, 1, key);
    const float scale =
        a.cache.format == KvCacheFormat::kFp8 ? a.cache.scale_plane(page)[token] : 1.0f;
    write_row(key, kKvLoraRank, scale * unscale, a.latent_out, row);
    write_row(key + kKvLoraRank, kQkRopeHeadDim, scale, a.rope_out, row);
  });
}

}  // namespace snapmla::cpu
