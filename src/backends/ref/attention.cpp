// MLA attention: absorbed decode over the paged cache, naive prefill.
//
// One row is one (request, query token, head). Decode over an FP8 cache follows numeric/softmax.h
// exactly; over BF16 and F32 caches P stays in f32. Splits are normalised on their own and combined
// in base 2.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "backends/ref/ref_ops.h"
#include "numeric/softmax.h"
#include "numeric/tensor_core.h"
#include "ops/element.h"
#include "plan/split.h"

namespace snapmla::ref {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Partial {
  std::vector<double> out = std::vector<double>(kKvLoraRank, 0.0);
  float lse2 = -kInf;
};

// The key of one token, decoded; scale 1 where the format has none.
struct Key {
  float latent[kKvLoraRank];
  float rope[kQkRopeHeadDim];
  float scale;
};

void read_key(const KvCacheView& cache, std::int64_t page, std::int64_t token, Key& key) {
  const bool fp8 = cache.format == KvCacheFormat::kFp8, f32 = cache.format == KvCacheFormat::kF32;
  const DType latent_type = fp8 ? DType::kE4M3 : f32 ? DType::kF32 : DType::kBF16;
  const DType rope_type = f32 ? DType::kF32 : DType::kBF16;
  const auto read = [&](const std::uint8_t* plane, DType type, std::int64_t width, float* to) {
    const auto size = static_cast<std::int64_t>(size_of(type));
    for (std::int64_t d = 0; d < width; ++d) {
      to[d] =
          ops::load(plane + element_offset(cache.image, width * size, token, d * size), type, 0);
    }
  };
  read(cache.latent_plane(page), latent_type, kKvLoraRank, key.latent);
  read(cache.rope_plane(page), rope_type, kQkRopeHeadDim, key.rope);
  key.scale = fp8 ? cache.scale_plane(page)[token] : 1.0f;
}

struct Query {
  float latent[kKvLoraRank];
  float rope[kQkRopeHeadDim];
  float scale;
};

Query read_query(const MlaDecodeArgs& a, std::int64_t b, std::int64_t s, std::int64_t h) {
  Query q;
  const auto read = [&](const TensorView& t, std::int64_t width, float* to) {
    const std::int64_t at = b * t.stride(0) + s * t.stride(1) + h * t.stride(2);
    for (std::int64_t d = 0; d < width; ++d) to[d] = ops::load(t.raw(), t.dtype(), at + d);
  };
  read(a.q_latent, kKvLoraRank, q.latent);
  read(a.q_rope, kQkRopeHeadDim, q.rope);
  q.scale = a.q_scale.raw() ? a.q_scale.row<float>(b, s)[h] : 1.0f;
  return q;
}

float score(const Query& q, const Key& k) {
  double sum = 0;
  for (int d = 0; d < kKvLoraRank; ++d) sum += static_cast<double>(q.latent[d]) * k.latent[d];
  for (int d = 0; d < kQkRopeHeadDim; ++d) sum += static_cast<double>(q.rope[d]) * k.rope[d];
  return static_cast<float>(sum);
}

// T = sum over the block of P' times latent, with the accumulation that was asked for.
void add_values(const std::vector<Key>& keys, const std::vector<float>& p, bool tensor_core, int d,
                double& sum) {
  if (!tensor_core) {
    for (std::size_t j = 0; j < keys.size(); ++j)
      sum += static_cast<double>(p[j]) * keys[j].latent[d];
    return;
  }
  // One level, and a block so far below the running sum that the sum in the block's units leaves
  // f32: every product is cut off whole.
  if (std::fabs(sum) > std::numeric_limits<float>::max()) return;
  for (std::size_t begin = 0; begin < keys.size(); begin += numeric::kTensorCoreGroup) {
    const std::size_t count = std::min<std::size_t>(numeric::kTensorCoreGroup, keys.size() - begin);
    std::array<float, numeric::kTensorCoreGroup> latent;
    for (std::size_t k = 0; k < count; ++k) latent[k] = keys[begin + k].latent[d];
    sum = numeric::tensor_core_add(static_cast<float>(sum), std::span(p).subspan(begin, count),
                                   std::span(latent).first(count));
  }
}

// One block of tokens of one row.
void attend_block(const MlaDecodeArgs& a, const Query& q, const std::vector<Key>& keys,
                  numeric::RowState& row, std::vector<double>& out) {
  const bool fp8 = a.cache.format == KvCacheFormat::kFp8;
  const float row_factor = q.scale * a.softmax_scale * numeric::kLog2E;
  std::vector<float> y(keys.size());
  float maximum = -kInf;
  bool has_nan = false;
  for (std::size_t j = 0; j < keys.size(); ++j) {
    const float x = score(q, keys[j]) * keys[j].scale * row_factor;
    y[j] = fp8 ? x + numeric::log2_scale(keys[j].scale) : x;
    has_nan = has_nan || std::isnan(y[j]);
    maximum = std::fmax(maximum, y[j]);
  }
  const numeric::BlockFactors f = numeric::begin_block(row, maximum, has_nan);
  if (f.skip) return;
  std::vector<float> p(keys.size());
  double sum = 0;
  for (std::size_t j = 0; j < keys.size(); ++j) {
    p[j] = fp8 ? numeric::e4m3_to_float(numeric::quantize_p(y[j], f.maximum))
               : numeric::kE4M3Max * std::exp2(y[j] - f.maximum);
    sum += p[j] / keys[j].scale;
  }
  row.sum += f.sigma * static_cast<float>(sum);
  const bool one_level = fp8 && !a.numerics.two_level_accumulation;
  for (int d = 0; d < kKvLoraRank; ++d) {
    double& o = out[static_cast<std::size_t>(d)];
    o *= f.rescale;
    // One level: the running sum itself, in units of sigma, is the accumulator of the chain.
    double t = one_level && f.sigma > 0 ? o / f.sigma : 0.0;
    add_values(keys, p, fp8 && a.numerics.tensor_core_model, d, t);
    o = one_level ? t * f.sigma : o + f.sigma * t;
  }
}

Partial attend_split(const MlaDecodeArgs& a, std::int64_t b, std::int64_t visible, const Query& q,
                     plan::PageRange range) {
  Partial result;
  numeric::RowState row;
  const std::int64_t step = a.numerics.p_block / kPageSize;
  const std::int32_t* table = a.block_table.row<std::int32_t>(b);
  std::vector<Key> keys;
  for (std::int64_t page = range.begin; page < range.end; page += step) {
    const std::int64_t end = std::min(std::min(page + step, range.end) * kPageSize, visible);
    keys.clear();
    for (std::int64_t t = page * kPageSize; t < end; ++t) {
      read_key(a.cache, table[t / kPageSize], t % kPageSize, keys.emplace_back());
    }
    if (!keys.empty()) attend_block(a, q, keys, row, result.out);
  }
  result.lse2 = numeric::row_lse2(row);
  if (row.sum != 0.0f) {
    for (double& o : result.out) o /= row.sum;
  }
  return result;
}

// O = sum w_s O_s / sum w_s with w_s = 2^(lse2_s - max). Splits of weight zero are not touched.
Partial combine(const std::vector<Partial>& partials) {
  Partial total;
  float m = -kInf;
  bool has_nan = false;
  for (const Partial& p : partials) {
    m = std::fmax(m, p.lse2);
    has_nan = has_nan || std::isnan(p.lse2);
  }
  if (m == -kInf && !has_nan) return total;
  float weights = 0;
  for (const Partial& p : partials) {
    const float w = std::exp2(p.lse2 - m);
    if (w == 0.0f) continue;
    weights += w;
    for (std::size_t d = 0; d < total.out.size(); ++d) total.out[d] += w * p.out[d];
  }
  for (double& o : total.out) o /= weights;
  total.lse2 = m + std::log2(weights);
  return total;
}

}  // namespace

void mla_decode(const MlaDecodeArgs& a) {
  const std::int64_t seqlen_q = a.q_latent.dim(1);
  for (std::int64_t b = 0; b < a.q_latent.dim(0); ++b) {
    const std::int64_t length = a.cache_seqlens.data<std::int32_t>()[b];
    const std::int64_t splits = plan::num_splits(length, a.num_splits);
    for (std::int64_t s = 0; s < seqlen_q; ++s) {
      const std::int64_t visible = length - seqlen_q + s + 1;
      for (std::int64_t h = 0; h < a.q_latent.dim(2); ++h) {
        const Query q = read_query(a, b, s, h);
        std::vector<Partial> partials;
        for (std::int64_t i = 0; i < splits; ++i) {
          partials.push_back(attend_split(
              a, b, visible, q, plan::split_pages(length, splits, i, a.numerics.p_block)));
        }
        const Partial total = combine(partials);
        const std::int64_t at = b * a.out.stride(0) + s * a.out.stride(1) + h * a.out.stride(2);
        for (std::int64_t d = 0; d < kKvLoraRank; ++d) {
          ops::store(a.out.raw(), a.out.dtype(), at + d,
                     static_cast<float>(total.out[static_cast<std::size_t>(d)]));
        }
        if (a.lse.raw()) a.lse.row<float>(b, h)[s] = numeric::kLn2 * total.lse2;
      }
    }
  }
}

void mla_prefill(const ops::MlaPrefillArgs& a) {
  const std::int64_t nope = a.k_nope.dim(2), rope = a.k_rope.dim(1), v_dim = a.v.dim(2);
  std::vector<double> scores, out(static_cast<std::size_t>(v_dim));
  for (std::int64_t t = 0; t < a.q.dim(0); ++t) {
    const std::int64_t keys = a.query_begin + t + 1;
    for (std::int64_t h = 0; h < a.q.dim(1); ++h) {
      const float* q = a.q.row<float>(t, h);
      scores.assign(static_cast<std::size_t>(keys), 0.0);
      double maximum = -std::numeric_limits<double>::infinity(), sum = 0;
      for (std::int64_t j = 0; j < keys; ++j) {
        double s = 0;
        for (std::int64_t d = 0; d < nope; ++d)
          s += static_cast<double>(q[d]) * a.k_nope.row<float>(j, h)[d];
        for (std::int64_t d = 0; d < rope; ++d)
          s += static_cast<double>(q[nope + d]) * a.k_rope.row<float>(j)[d];
        scores[static_cast<std::size_t>(j)] = s * a.softmax_scale;
        maximum = std::fmax(maximum, s * a.softmax_scale);
      }
      std::fill(out.begin(), out.end(), 0.0);
      for (std::int64_t j = 0; j < keys; ++j) {
        const double p = std::exp(scores[static_cast<std::size_t>(j)] - maximum);
        sum += p;
        for (std::int64_t d = 0; d < v_dim; ++d)
          out[static_cast<std::size_t>(d)] += p * a.v.row<float>(j, h)[d];
      }
      for (std::int64_t d = 0; d < v_dim; ++d) {
        a.out.row<float>(t, h)[d] = static_cast<float>(out[static_cast<std::size_t>(d)] / sum);
      }
    }
  }
}

}  // namespace snapmla::ref
