#include "agreement/decode_problem.h"

#include <cstring>

namespace snapmla::agreement {

void append(ops::OpSet& backend, Problem& p) {
  const auto n = static_cast<std::int64_t>(p.slots.size());
  AppendKvArgs a;
  a.latent = TensorView::of(p.latent.data(), {n, kKvLoraRank});
  a.rope = TensorView::of(p.rope.data(), {n, kQkRopeHeadDim});
  a.slot_mapping = TensorView::of(p.slots.data(), {n});
  a.cache = p.cache->view();
  a.scale_mode = p.shape.scale_mode;
  ops::append_kv(backend, a);
}

void prepare_queries(ops::OpSet& backend, Problem& p, std::mt19937& rng) {
  const Shape& s = p.shape;
  const auto fill = [](auto& operand, const std::vector<float>& from, auto convert) {
    for (std::size_t i = 0; i < from.size(); ++i)
      (*operand)[static_cast<std::int64_t>(i)] = convert(from[i]);
  };
  const auto shape = [&](std::int64_t width) {
    return std::vector<std::int64_t>{p.batch, s.seqlen_q, s.heads, width};
  };
  const auto same = [](float v) { return v; };
  p.q_latent32 = std::make_unique<Operand<float>>(shape(512), s.padded, rng);
  p.q_rope32 = std::make_unique<Operand<float>>(shape(64), s.padded, rng);
  p.q_latent16 = std::make_unique<Operand<BFloat16>>(shape(512), s.padded, rng);
  p.q_rope16 = std::make_unique<Operand<BFloat16>>(shape(64), s.padded, rng);
  fill(p.q_latent32, p.q_latent, same);
  fill(p.q_rope32, p.q_rope, same);
  if (s.format == KvCacheFormat::kBf16) {
    fill(p.q_latent16, p.q_latent, bf16_of);
    fill(p.q_rope16, p.q_rope, bf16_of);
  }
  if (s.format != KvCacheFormat::kFp8) return;
  p.q_codes = std::make_unique<Operand<Float8E4M3>>(shape(512), s.padded, rng);
  p.q_scale = std::make_unique<Operand<float>>(
      std::vector<std::int64_t>{p.batch, s.seqlen_q, s.heads}, s.padded, rng);
  ops::quantize_q(backend, {p.q_latent32->view(), p.q_rope32->view(), p.q_codes->view(),
                            p.q_rope16->view(), p.q_scale->view(), s.scale_mode});
  p.q_codes->expect_surroundings_untouched("q_latent_out");
  p.q_rope16->expect_surroundings_untouched("q_rope_out");
  p.q_scale->expect_surroundings_untouched("q_scale_out");
}

Problem make_problem(const Shape& shape, unsigned seed, ops::OpSet& backend) {
  Problem p;
  p.shape = shape;
  p.batch = static_cast<std::int64_t>(shape.lengths.size());
  std::int64_t pages = 0;
  for (std::int32_t length : shape.lengths) {
    pages += (length + 63) / 64;
    p.max_pages = std::max<std::int64_t>(p.max_pages, (length + 63) / 64);
  }
  p.max_pages += 2;
  p.cache = std::make_unique<Cache>(shape.format, shape.image, shape.separate, pages + 3);
  const std::int32_t junk[] = {2147480000, -1, INT_MIN};
  for (std::int64_t i = 0; i < p.batch * p.max_pages; ++i) p.table.push_back(junk[i % 3]);

  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> uniform(-1.5f, 1.5f);
  std::vector<std::int32_t> free(static_cast<std::size_t>(pages + 3));
  std::iota(free.begin(), free.end(), 0);
  std::shuffle(free.begin(), free.end(), rng);
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int32_t t = 0; t < shape.lengths[static_cast<std::size_t>(b)]; ++t) {
      std::int32_t& page = p.table[static_cast<std::size_t>(b * p.max_pages + t / 64)];
      if (t % 64 == 0) page = free.back(), free.pop_back();
      p.slots.push_back(static_cast<std::int64_t>(page) * 64 + t % 64);
      // One token in 64 has a zero latent, one in 64 a tiny one beside an ordinary RoPE part.
      const auto kind = rng() % 64;
      const float size = kind == 0 ? 0.0f : kind == 1 ? 0x1p-50f : std::exp2(uniform(rng) * 2.0f);
      for (int d = 0; d < kKvLoraRank; ++d)
        p.latent.push_back(truncated_to_bf16(size * uniform(rng)));
      for (int d = 0; d < kQkRopeHeadDim; ++d)
        p.rope.push_back(truncated_to_bf16(3 * uniform(rng)));
    }
  }
  append(backend, p);
  for (std::int64_t i = 0; i < p.rows() * kKvLoraRank; ++i)
    p.q_latent.push_back(truncated_to_bf16(uniform(rng)));
  for (std::int64_t i = 0; i < p.rows() * kQkRopeHeadDim; ++i)
    p.q_rope.push_back(truncated_to_bf16(uniform(rng)));
  prepare_queries(backend, p, rng);
  return p;
}

MlaDecodeArgs Problem::args() {
  const bool fp8 = shape.format == KvCacheFormat::kFp8, f32 = shape.format == KvCacheFormat::kF32;
  MlaDecodeArgs a;
  a.q_latent = fp8 ? q_codes->view() : f32 ? q_latent32->view() : q_latent16->view();
  a.q_rope = f32 ? q_rope32->view() : q_rope16->view();
  if (fp8) a.q_scale = q_scale->view();
  a.cache = cache->view();
  a.block_table = TensorView::of(table.data(), {batch, max_pages});
  a.cache_seqlens = TensorView::of(shape.lengths.data(), {batch});
  a.softmax_scale = shape.softmax_scale;
  a.num_splits = shape.num_splits;
  a.numerics.p_block = shape.p_block;
  a.numerics.two_level_accumulation = shape.accumulation == Accumulation::kTwoLevel ||
                                      shape.accumulation == Accumulation::kTensorCore;
  a.numerics.tensor_core_model = shape.accumulation == Accumulation::kTensorCore ||
                                 shape.accumulation == Accumulation::kTensorCoreOneLevel;
  return a;
}

Result Problem::decode(ops::OpSet& backend) {
  std::mt19937 rng(3);
  Operand<float> out({batch, shape.seqlen_q, shape.heads, kKvLoraRank}, shape.padded, rng);
  Operand<float> lse({batch, shape.heads, shape.seqlen_q}, shape.padded, rng);
  MlaDecodeArgs a = args();
  a.out = out.view();
  if (shape.lse) a.lse = lse.view();
  const std::vector<std::uint8_t> before = cache->bytes();
  ops::mla_decode(backend, a);
  EXPECT_TRUE(before == cache->bytes()) << "decode wrote into the cache";
  out.expect_surroundings_untouched("out");
  lse.expect_surroundings_untouched("lse");
  return {out.values(), shape.lse ? lse.values() : std::vector<float>{}};
}

std::vector<BFloat16> Problem::decode_to_bf16(ops::OpSet& backend) {
  std::mt19937 rng(4);
  Operand<BFloat16> out({batch, shape.seqlen_q, shape.heads, kKvLoraRank}, shape.padded, rng);
  MlaDecodeArgs a = args();
  a.out = out.view();
  ops::mla_decode(backend, a);
  out.expect_surroundings_untouched("out");
  return out.values();
}

std::vector<double> Problem::query(std::int64_t row) const {
  std::vector<double> q(576);
  const bool fp8 = shape.format == KvCacheFormat::kFp8;
  const double scale = fp8 ? (*q_scale)[row] : 1.0;
  for (std::int64_t d = 0; d < 512; ++d) {
    const auto at = static_cast<std::size_t>(row * 512 + d);
    q[static_cast<std::size_t>(d)] =
        fp8 ? scale * e4m3_value((*q_codes)[row * 512 + d].bits) : q_latent[at];
  }
  for (std::int64_t d = 0; d < 64; ++d) {
    const auto at = static_cast<std::size_t>(row * 64 + d);
    q[static_cast<std::size_t>(512 + d)] =
        fp8 ? scale * bf16_value((*q_rope16)[row * 64 + d].bits) : q_rope[at];
  }
  return q;
}

double Problem::key(std::int64_t b, std::int64_t token, double* to) const {
  const KvCacheView& c = cache->view();
  const PageLayout& l = cache->layout();
  const std::int64_t at = page(b, token), t = token % 64;
  for (int d = 0; d < 512; ++d)
    to[d] = stored(c.latent + at * c.latent_page_stride, c.image, 512, l.latent_elem_bytes, t, d);
  for (int d = 0; d < 64; ++d)
    to[512 + d] = stored(c.rope + at * c.rope_page_stride, c.image, 64, l.rope_elem_bytes, t, d);
  float scale = 1;
  if (l.has_scale) std::memcpy(&scale, c.scale + at * c.scale_page_stride + 4 * t, 4);
  return scale;
}

}  // namespace snapmla::agreement
