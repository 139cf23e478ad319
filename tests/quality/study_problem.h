// Keys and queries for the study operations, in ordinary host memory or a backend's.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "ops/op_set.h"
#include "tensor/memory.h"

namespace snapmla::quality {

struct StudyShape {
  std::vector<std::int32_t> lengths = {200, 64, 1};
  std::int64_t seqlen_q = 1, heads = 8;
  float spread = 2.0f;  // tokens differ in size by up to 2^(2 spread)
  float softmax_scale = 0.07f;
};

// One set of keys and queries; caches of either kind are filled from them.
class StudyProblem {
 public:
  StudyProblem(const StudyShape& shape, unsigned seed, ops::OpSet& backend)
      : shape_(shape), ops_(backend) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    std::int32_t pages = 0;
    for (const std::int32_t n : shape.lengths)
      max_pages_ = std::max<std::int64_t>(max_pages_, (n + 63) / 64);
    for (const std::int32_t n : shape.lengths) {
      for (std::int64_t i = 0; i < max_pages_; ++i) table.push_back(i * 64 < n ? pages++ : -1);
    }
    num_pages = pages;
    for (std::size_t b = 0; b < shape.lengths.size(); ++b) {
      for (std::int32_t t = 0; t < shape.lengths[b]; ++t) {
        const auto page =
            table[b * static_cast<std::size_t>(max_pages_) + static_cast<std::size_t>(t / 64)];
        slots.push_back(static_cast<std::int64_t>(page) * 64 + t % 64);
        const float size = std::exp2(shape.spread * uniform(rng));
        for (int d = 0; d < kKvLoraRank; ++d) latent.push_back(size * normal(rng));
        for (int d = 0; d < kQkRopeHeadDim; ++d) rope.push_back(3 * normal(rng));
      }
    }
    for (std::int64_t i = 0; i < rows() * kKvLoraRank; ++i) q_latent.push_back(bits16(normal(rng)));
    for (std::int64_t i = 0; i < rows() * kQkRopeHeadDim; ++i)
      q_rope.push_back(bits16(normal(rng)));
  }

  std::int64_t rows() const {
    return static_cast<std::int64_t>(shape_.lengths.size()) * shape_.seqlen_q * shape_.heads;
  }
  std::int64_t tokens() const { return static_cast<std::int64_t>(slots.size()); }

  // A cache filled by the backend's own append (rule null) or by a rule.
  KvCacheView fill(KvCacheFormat format, const numeric::StoreRule* rule) {
    KvCacheView cache =
        KvCacheView::of_pool(block(num_pages * page_layout(format).page_bytes), num_pages, format);
    if (format == KvCacheFormat::kF32) {
      cache.scale = static_cast<std::uint8_t*>(block(num_pages * kPageSize * 4));
      cache.scale_page_stride = kPageSize * 4;
    }
    const TensorView c = put(latent, {tokens(), kKvLoraRank});
    const TensorView r = put(rope, {tokens(), kQkRopeHeadDim});
    const TensorView s = put(slots, {tokens()});
    if (rule) {
      ops_.study_append({c, r, s, cache, *rule});
    } else {
      ops_.append_kv({c, r, s, cache, ScaleMode::kAmax});
    }
    return cache;
  }

  // Arguments with a quantised query; out is [rows, 512] f32.
  MlaDecodeArgs decode_args(const KvCacheView& cache) {
    const auto b = static_cast<std::int64_t>(shape_.lengths.size());
    const std::int64_t s = shape_.seqlen_q, h = shape_.heads;
    MlaDecodeArgs a;
    a.q_latent = TensorView(block(rows() * kKvLoraRank), DType::kE4M3, {b, s, h, kKvLoraRank});
    a.q_rope =
        TensorView(block(rows() * kQkRopeHeadDim * 2), DType::kBF16, {b, s, h, kQkRopeHeadDim});
    a.q_scale = TensorView(block(rows() * 4), DType::kF32, {b, s, h});
    ops_.quantize_q({put(q_latent, {b, s, h, kKvLoraRank}), put(q_rope, {b, s, h, kQkRopeHeadDim}),
                     a.q_latent, a.q_rope, a.q_scale, ScaleMode::kAmax});
    a.cache = cache;
    a.block_table = put(table, {b, max_pages_});
    a.cache_seqlens = put(shape_.lengths, {b});
    a.softmax_scale = shape_.softmax_scale;
    a.out = TensorView(block(rows() * kKvLoraRank * 4), DType::kF32, {b, s, h, kKvLoraRank});
    return a;
  }

  template <class T>
  std::vector<T> get(const void* from, std::int64_t count) {
    std::vector<T> values(static_cast<std::size_t>(count));
    ops_.memory().download(values.data(), from, count * static_cast<std::int64_t>(sizeof(T)));
    return values;
  }
  std::vector<float> out(const MlaDecodeArgs& a) {
    return get<float>(a.out.raw(), rows() * kKvLoraRank);
  }
  std::vector<std::uint8_t> bytes(const KvCacheView& cache) {
    return get<std::uint8_t>(cache.latent, num_pages * page_layout(cache.format).page_bytes);
  }

  std::int32_t num_pages = 0;
  std::vector<std::int32_t> table;
  std::vector<std::int64_t> slots;
  std::vector<float> latent, rope;
  std::vector<BFloat16> q_latent, q_rope;

 private:
  static BFloat16 bits16(float x) { return numeric::bf16_from_float(x); }
  // Zeroed, so that caches can be compared as bytes.
  void* block(std::int64_t bytes) {
    buffers_.emplace_back(ops_.memory(), bytes);
    ops_.memory().clear(buffers_.back().data(), bytes);
    return buffers_.back().data();
  }
  template <class T>
  TensorView put(const std::vector<T>& values, std::initializer_list<std::int64_t> shape) {
    const auto bytes = static_cast<std::int64_t>(values.size() * sizeof(T));
    void* to = block(bytes);
    ops_.memory().upload(to, values.data(), bytes);
    return TensorView::of(static_cast<const T*>(to), shape);
  }

  StudyShape shape_;
  ops::OpSet& ops_;
  std::int64_t max_pages_ = 0;
  std::vector<Buffer> buffers_;
};

inline double relative(const std::vector<float>& got, const std::vector<float>& want) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - want[i], 2);
    norm += std::pow(static_cast<double>(want[i]), 2);
  }
  return std::sqrt(error / norm);
}

}  // namespace snapmla::quality
