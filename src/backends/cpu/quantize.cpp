// Quantisation of queries and keys in strips of tokens (the scalar rules of the reference backend
// decide the bits), and reading token ranges back.
#include "backends/cpu/attention_kernels.h"
#include "backends/cpu/cpu_ops.h"
#include "backends/ref/ref_ops.h"
#include "ops/element.h"

namespace snapmla::cpu {
namespace {

constexpr std::int64_t kStrip = 16;

// Rows [begin, begin + n) of the first dimension.
TensorView rows(const TensorView& t, std::int64_t begin, std::int64_t n) {
  void* at = ops::element_ptr(t, begin * t.stride(0));
  TensorView v = t.rank() == 1   ? TensorView(at, t.dtype(), {n})
                 : t.rank() == 2 ? TensorView(at, t.dtype(), {n, t.dim(1)})
                 : t.rank() == 3 ? TensorView(at, t.dtype(), {n, t.dim(1), t.dim(2)})
                                 : TensorView(at, t.dtype(), {n, t.dim(1), t.dim(2), t.dim(3)});
  for (int d = 0; d < t.rank(); ++d) v = v.with_stride(d, t.stride(d));
  return v;
}

// from * scale to a row of f32 or bf16.
void write_row(const float* from, std::int64_t width, float scale, const TensorView& to,
               std::int64_t row) {
  if (to.dtype() == DType::kF32) {
    for (std::int64_t d = 0; d < width; ++d) to.row<float>(row)[d] = from[d] * scale;
  } else {
    for (std::int64_t d = 0; d < width; ++d)
      to.row<BFloat16>(row)[d] = numeric::bf16_from_float(from[d] * scale);
  }
}

}  // namespace

void quantize_q(ThreadPool& pool, const QuantizeQArgs& a) {
  pool.parallel_for(a.q_latent.dim(0), [&](std::int64_t b) {
    ref::quantize_q({rows(a.q_latent, b, 1), rows(a.q_rope, b, 1), rows(a.q_latent_out, b, 1),
                     rows(a.q_rope_out, b, 1), rows(a.q_scale_out, b, 1), a.scale_mode});
  });
}

void append_kv(ThreadPool& pool, const AppendKvArgs& a) {
  const std::int64_t tokens = a.latent.dim(0);
  pool.parallel_for((tokens + kStrip - 1) / kStrip, [&](std::int64_t strip) {
    const std::int64_t begin = strip * kStrip, n = std::min(kStrip, tokens - begin);
    ref::append_kv({rows(a.latent, begin, n), rows(a.rope, begin, n),
                    rows(a.slot_mapping, begin, n), a.cache, a.scale_mode});
  });
}

void fetch_dequant(ThreadPool& pool, const FetchDequantArgs& a) {
  const std::int64_t tokens = a.token_end - a.token_begin;
  pool.parallel_for((tokens + kStrip - 1) / kStrip, [&](std::int64_t strip) {
    float key[kKeyWidth];
    const float unscale = latent_unscale(a.cache.format);
    for (std::int64_t row = strip * kStrip; row < std::min(tokens, (strip + 1) * kStrip); ++row) {
      const std::int64_t t = a.token_begin + row, token = t % kPageSize;
      const std::int64_t page = a.block_table.data<std::int32_t>()[t / kPageSize];
      load_keys(a.cache, page, token, 1, key);
      const float scale =
          a.cache.format == KvCacheFormat::kFp8 ? a.cache.scale_plane(page)[token] : 1.0f;
      write_row(key, kKvLoraRank, scale * unscale, a.latent_out, row);
      write_row(key + kKvLoraRank, kQkRopeHeadDim, scale, a.rope_out, row);
    }
  });
}

}  // namespace snapmla::cpu
