// Quantisation of queries and keys in strips of tokens (the scalar rules of the reference backend
// decide the bits), and reading token ranges back.
#include "backends/cpu/cpu_ops.h"
#include "backends/cpu/page_reader.h"
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
    for (std::int64_t row = strip * kStrip; row < std::min(tokens, (strip + 1) * kStrip); ++row) {
      const std::int64_t t = a.token_begin + row;
      const std::int64_t page = a.block_table.data<std::int32_t>()[t / kPageSize],
                         token = t % kPageSize;
      read_key(a.cache, page, token, key);
      const float scale = read_scale(a.cache, page, token);
      for (std::int64_t d = 0; d < kKvLoraRank; ++d) {
        ops::store(a.latent_out.raw(), a.latent_out.dtype(), row * a.latent_out.stride(0) + d,
                   key[d] * scale);
      }
      for (std::int64_t d = 0; d < kQkRopeHeadDim; ++d) {
        ops::store(a.rope_out.raw(), a.rope_out.dtype(), row * a.rope_out.stride(0) + d,
                   key[kKvLoraRank + d] * scale);
      }
    }
  });
}

}  // namespace snapmla::cpu
