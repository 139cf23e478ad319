// Fronts of the operations on the paged cache.
#include <cmath>
#include <utility>

#include "ops/ops.h"
#include "ops/validate.h"

namespace snapmla::ops {
namespace {

constexpr std::initializer_list<DType> kF32OrBf16 = {DType::kF32, DType::kBF16};

void check_cache(const KvCacheView& c) {
  require(c.num_pages >= 1, "cache num_pages", c.num_pages, "at least 1");
  const PageLayout l = page_layout(c.format);
  if (!c.latent || !c.rope || (l.has_scale && !c.scale)) {
    refuse("cache", "a null plane pointer", "valid latent, rope and (FP8) scale pointers");
  }
  const auto check_address = [](const char* name, const std::uint8_t* at, std::int64_t unit) {
    if (reinterpret_cast<std::uintptr_t>(at) % static_cast<std::uintptr_t>(unit) != 0) {
      refuse(name, "an address that is no multiple of its element size", "an aligned pointer");
    }
  };
  check_address("cache latent", c.latent, l.latent_elem_bytes);
  check_address("cache rope", c.rope, l.rope_elem_bytes);
  if (l.has_scale) check_address("cache scale", c.scale, 4);
  const auto check_stride = [&c](const char* name, std::int64_t got, std::int64_t least) {
    if (got < least || got % 4 != 0) {
      refuse(name, str(got, " bytes"), str("a multiple of 4 of at least ", least, " bytes"));
    }
    std::int64_t bytes = 0;
    if (__builtin_mul_overflow(c.num_pages, got, &bytes)) {
      refuse(name, str(got, " bytes for ", c.num_pages, " pages"), "less than 2^63 bytes in all");
    }
  };
  check_stride("cache latent_page_stride", c.latent_page_stride,
               kPageSize * kKvLoraRank * l.latent_elem_bytes);
  check_stride("cache rope_page_stride", c.rope_page_stride,
               kPageSize * kQkRopeHeadDim * l.rope_elem_bytes);
  if (l.has_scale) check_stride("cache scale_page_stride", c.scale_page_stride, kPageSize * 4);
}

// `t` is read while the cache is written, or the other way round.
void check_apart(const char* name, const TensorView& t, const KvCacheView& c) {
  const PageLayout l = page_layout(c.format);
  const auto plane = [&](const std::uint8_t* at, std::int64_t stride, std::int64_t bytes) {
    if (overlap(t.raw(), *byte_span(t), at, (c.num_pages - 1) * stride + bytes)) {
      refuse(name, "memory that overlaps the cache", "memory of its own");
    }
  };
  plane(c.latent, c.latent_page_stride, kPageSize * kKvLoraRank * l.latent_elem_bytes);
  plane(c.rope, c.rope_page_stride, kPageSize * kQkRopeHeadDim * l.rope_elem_bytes);
  if (l.has_scale) plane(c.scale, c.scale_page_stride, kPageSize * 4);
}

void check_table_width(std::int64_t entries, std::int64_t tokens, std::int64_t request) {
  const std::int64_t used = (tokens + kPageSize - 1) / kPageSize;
  if (used > entries) {
    refuse("block_table", str(entries, " pages for the ", tokens, " tokens of request ", request),
           str("at least ", used, " pages"));
  }
}

// The entries that `tokens` tokens use must be pages of the pool; the others are never looked at.
void check_table(const std::int32_t* table, std::int64_t entries, std::int64_t tokens,
                 std::int64_t num_pages, std::int64_t request) {
  const std::int64_t used = (tokens + kPageSize - 1) / kPageSize;
  check_table_width(entries, tokens, request);
  for (std::int64_t i = 0; i < used; ++i) {
    if (table[i] < 0 || table[i] >= num_pages) {
      refuse("block_table", str("page ", table[i], " at [", request, ", ", i, "]"),
             str("0 to ", num_pages - 1));
    }
  }
}

bool readable(OpSet& ops) { return ops.memory().host_accessible(); }

}  // namespace

void check_args(const QuantizeQArgs& a) {
  check_tensor("q_latent", a.q_latent, {kAny, kAny, kAny, kKvLoraRank}, kF32OrBf16);
  const std::int64_t b = a.q_latent.dim(0), s = a.q_latent.dim(1), h = a.q_latent.dim(2);
  check_tensor("q_rope", a.q_rope, {b, s, h, kQkRopeHeadDim}, kF32OrBf16);
  check_output("q_latent_out", a.q_latent_out, {b, s, h, kKvLoraRank}, {DType::kE4M3});
  check_output("q_rope_out", a.q_rope_out, {b, s, h, kQkRopeHeadDim}, {DType::kBF16});
  check_output("q_scale_out", a.q_scale_out, {b, s, h}, {DType::kF32});
  check_no_overlap("q_latent_out", a.q_latent_out, "q_latent", a.q_latent);
  check_no_overlap("q_latent_out", a.q_latent_out, "q_rope", a.q_rope);
  check_no_overlap("q_rope_out", a.q_rope_out, "q_latent", a.q_latent);
  check_no_overlap("q_rope_out", a.q_rope_out, "q_rope", a.q_rope);
  check_no_overlap("q_rope_out", a.q_rope_out, "q_latent_out", a.q_latent_out);
  check_no_overlap("q_scale_out", a.q_scale_out, "q_latent", a.q_latent);
  check_no_overlap("q_scale_out", a.q_scale_out, "q_rope", a.q_rope);
  check_no_overlap("q_scale_out", a.q_scale_out, "q_latent_out", a.q_latent_out);
  check_no_overlap("q_scale_out", a.q_scale_out, "q_rope_out", a.q_rope_out);
}

void quantize_q(OpSet& ops, const QuantizeQArgs& a) {
  check_args(a);
  if (a.q_scale_out.numel() > 0) ops.quantize_q(a);
}

void check_args(const AppendKvArgs& a) {
  check_tensor("latent", a.latent, {kAny, kKvLoraRank}, kF32OrBf16);
  check_tensor("rope", a.rope, {a.latent.dim(0), kQkRopeHeadDim}, kF32OrBf16);
  check_tensor("slot_mapping", a.slot_mapping, {a.latent.dim(0)}, {DType::kI64});
  check_cache(a.cache);
  check_apart("latent", a.latent, a.cache);
  check_apart("rope", a.rope, a.cache);
  check_apart("slot_mapping", a.slot_mapping, a.cache);
}

void append_kv(OpSet& ops, const AppendKvArgs& a) {
  check_args(a);
  for (std::int64_t i = 0; readable(ops) && i < a.latent.dim(0); ++i) {
    const std::int64_t slot = a.slot_mapping.data<std::int64_t>()[i];
    if (slot < -1 || slot >= a.cache.num_pages * kPageSize) {
      refuse("slot_mapping", str("slot ", slot, " for token ", i),
             str("-1 (skip) to ", a.cache.num_pages * kPageSize - 1));
    }
  }
  if (a.latent.dim(0) > 0) ops.append_kv(a);
}

void check_args(const FetchDequantArgs& a) {
  check_cache(a.cache);
  check_tensor("block_table", a.block_table, {kAny}, {DType::kI32});
  if (a.token_begin < 0 || a.token_end < a.token_begin) {
    refuse("token range", str("[", a.token_begin, ", ", a.token_end, ")"), "0 <= begin <= end");
  }
  require(a.token_end <= std::int64_t{1} << 48, "token_end", a.token_end, "at most 2^48");
  const std::int64_t n = a.token_end - a.token_begin;
  check_output("latent_out", a.latent_out, {n, kKvLoraRank}, kF32OrBf16);
  check_output("rope_out", a.rope_out, {n, kQkRopeHeadDim}, kF32OrBf16);
  check_no_overlap("rope_out", a.rope_out, "latent_out", a.latent_out);
  for (const auto& [name, out] :
       {std::pair("latent_out", a.latent_out), std::pair("rope_out", a.rope_out)}) {
    check_no_overlap(name, out, "block_table", a.block_table);
    check_apart(name, out, a.cache);
  }
  check_table_width(a.block_table.dim(0), a.token_end, 0);
}

void fetch_dequant(OpSet& ops, const FetchDequantArgs& a) {
  check_args(a);
  if (readable(ops)) {
    check_table(a.block_table.data<std::int32_t>(), a.block_table.dim(0), a.token_end,
                a.cache.num_pages, 0);
  }
  if (a.token_end > a.token_begin) ops.fetch_dequant(a);
}

void check_args(const MlaDecodeArgs& a) {
  check_cache(a.cache);
  const bool fp8 = a.cache.format == KvCacheFormat::kFp8,
             f32 = a.cache.format == KvCacheFormat::kF32;
  const DType latent_type = fp8 ? DType::kE4M3 : f32 ? DType::kF32 : DType::kBF16;
  check_tensor("q_latent", a.q_latent, {kAny, kAny, kAny, kKvLoraRank}, {latent_type});
  const std::int64_t b = a.q_latent.dim(0), s = a.q_latent.dim(1), h = a.q_latent.dim(2);
  require(s >= 1 && s <= kMaxSeqlenQ, "seqlen_q", s, "1 to 16");
  require(h >= 1 && h <= kMaxHeadsQ, "heads_q", h, "1 to 128");
  check_tensor("q_rope", a.q_rope, {b, s, h, kQkRopeHeadDim}, {f32 ? DType::kF32 : DType::kBF16});
  if (fp8) check_tensor("q_scale", a.q_scale, {b, s, h}, {DType::kF32});
  check_tensor("block_table", a.block_table, {b, kAny}, {DType::kI32});
  check_tensor("cache_seqlens", a.cache_seqlens, {b}, {DType::kI32});
  check_output("out", a.out, {b, s, h, kKvLoraRank}, kF32OrBf16);
  if (a.lse.raw()) check_output("lse", a.lse, {b, h, s}, {DType::kF32});
  require(std::isfinite(a.softmax_scale) && a.softmax_scale > 0, "softmax_scale", a.softmax_scale,
          "a finite number > 0");
  require(a.num_splits >= 0 && a.num_splits <= 4096, "num_splits", a.num_splits,
          "0 (automatic) to 4096");
  require(a.numerics.p_block == 64 || a.numerics.p_block == 128, "p_block", a.numerics.p_block,
          "64 or 128");
  if (a.lse.raw()) check_no_overlap("lse", a.lse, "out", a.out);
  for (const auto& [name, out] : {std::pair("out", a.out), std::pair("lse", a.lse)}) {
    if (!out.raw()) continue;
    check_no_overlap(name, out, "q_latent", a.q_latent);
    check_no_overlap(name, out, "q_rope", a.q_rope);
    if (fp8) check_no_overlap(name, out, "q_scale", a.q_scale);
    check_no_overlap(name, out, "block_table", a.block_table);
    check_no_overlap(name, out, "cache_seqlens", a.cache_seqlens);
    check_apart(name, out, a.cache);
  }
}

void mla_decode(OpSet& ops, const MlaDecodeArgs& a) {
  check_args(a);
  const std::int64_t b = a.q_latent.dim(0);
  for (std::int64_t i = 0; readable(ops) && i < b; ++i) {
    const std::int32_t length = a.cache_seqlens.data<std::int32_t>()[i];
    if (length < 0) refuse("cache_seqlens", str(length, " for request ", i), "at least 0");
    check_table(a.block_table.row<std::int32_t>(i), a.block_table.dim(1), length, a.cache.num_pages,
                i);
  }
  if (b > 0) ops.mla_decode(a);
}

}  // namespace snapmla::ops
