// Absorbed decode on the host. A work item is (request, split, group of rows): it decodes each
// block of keys to f32 once and runs all its rows over it, following numeric/softmax.h for an FP8
// cache.
#include <cmath>
#include <limits>
#include <vector>

#include "backends/cpu/cpu_ops.h"
#include "backends/cpu/page_reader.h"
#include "numeric/softmax.h"
#include "ops/element.h"
#include "plan/split.h"

namespace snapmla::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr std::int64_t kRowsPerItem = 16;
constexpr std::int64_t kMaxBlock = 128;

struct Item {
  std::int64_t request, split, first_row, num_rows;
};

// Scratch of one thread.
struct Scratch {
  std::vector<float> keys = std::vector<float>(kMaxBlock * kKeyWidth);
  std::vector<float> queries = std::vector<float>(kRowsPerItem * kKeyWidth);
  std::vector<float> values = std::vector<float>(kKvLoraRank);
  float scale[kMaxBlock], log2_scale[kMaxBlock], y[kMaxBlock];
};

class Decode {
 public:
  explicit Decode(const MlaDecodeArgs& a)
      : a_(a), seqlen_q_(a.q_latent.dim(1)), heads_(a.q_latent.dim(2)) {
    const std::int64_t batch = a.q_latent.dim(0), rows = seqlen_q_ * heads_;
    for (std::int64_t b = 0; b < batch; ++b) {
      first_partial_.push_back(num_partials_);
      const std::int64_t splits = plan::num_splits(length(b), a.num_splits);
      for (std::int64_t s = 0; s < splits; ++s) {
        for (std::int64_t r = 0; r < rows; r += kRowsPerItem)
          items_.push_back({b, s, r, std::min(kRowsPerItem, rows - r)});
      }
      num_partials_ += splits * rows;
    }
    first_partial_.push_back(num_partials_);
    out_.assign(static_cast<std::size_t>(num_partials_ * kKvLoraRank), 0.0f);
    lse2_.assign(static_cast<std::size_t>(num_partials_), -kInf);
  }

  void run(ThreadPool& pool) {
    pool.parallel_for(static_cast<std::int64_t>(items_.size()),
                      [&](std::int64_t i) { attend(items_[static_cast<std::size_t>(i)]); });
    pool.parallel_for(a_.q_latent.dim(0), [&](std::int64_t b) {
      for (std::int64_t row = 0; row < seqlen_q_ * heads_; ++row) combine(b, row);
    });
  }

 private:
  std::int64_t length(std::int64_t b) const { return a_.cache_seqlens.data<std::int32_t>()[b]; }

  void load_query(std::int64_t b, std::int64_t row, float* to) const {
    const auto read = [&](const TensorView& t, std::int64_t width, float* out) {
      const std::int64_t at =
          b * t.stride(0) + row / heads_ * t.stride(1) + row % heads_ * t.stride(2);
      if (t.dtype() == DType::kE4M3) {
        decode_e4m3(t.data<Float8E4M3>() + at, 1.0f, out, width);
      } else if (t.dtype() == DType::kBF16) {
        decode_bf16(t.data<BFloat16>() + at, out, width);
      } else {
        std::copy_n(t.data<float>() + at, width, out);
      }
    };
    read(a_.q_latent, kKvLoraRank, to);
    read(a_.q_rope, kQkRopeHeadDim, to + kKvLoraRank);
  }

  float row_factor(std::int64_t b, std::int64_t row) const {
    const float q_scale =
        a_.q_scale.raw() ? a_.q_scale.row<float>(b, row / heads_)[row % heads_] : 1.0f;
    return q_scale * a_.softmax_scale * numeric::kLog2E;
  }

  void attend(const Item& item) {
    thread_local Scratch s;
    numeric::RowState state[kRowsPerItem];
    const std::int64_t rows = seqlen_q_ * heads_;
    const std::int64_t partial =
        first_partial_[static_cast<std::size_t>(item.request)] + item.split * rows + item.first_row;
    for (std::int64_t r = 0; r < item.num_rows; ++r)
      load_query(item.request, item.first_row + r,
                 &s.queries[static_cast<std::size_t>(r * kKeyWidth)]);
    const std::int64_t splits = plan::num_splits(length(item.request), a_.num_splits);
    const plan::PageRange range =
        plan::split_pages(length(item.request), splits, item.split, a_.numerics.p_block);
    const std::int64_t step = a_.numerics.p_block / kPageSize;
    const bool fp8 = a_.cache.format == KvCacheFormat::kFp8;
    for (std::int64_t page = range.begin; page < range.end; page += step) {
      const std::int64_t begin = page * kPageSize;
      const std::int64_t end =
          std::min(std::min(page + step, range.end) * kPageSize, length(item.request));
      load_keys(item.request, begin, end, fp8, s);
      for (std::int64_t r = 0; r < item.num_rows; ++r) {
        const std::int64_t visible =
            length(item.request) - seqlen_q_ + (item.first_row + r) / heads_ + 1;
        const std::int64_t n = std::min(end, visible) - begin;
        if (n <= 0) continue;
        float* out = &out_[static_cast<std::size_t>((partial + r) * kKvLoraRank)];
        attend_row(&s.queries[static_cast<std::size_t>(r * kKeyWidth)],
                   row_factor(item.request, item.first_row + r), n, fp8, s, state[r], out);
      }
    }
    for (std::int64_t r = 0; r < item.num_rows; ++r) {
      lse2_[static_cast<std::size_t>(partial + r)] = numeric::row_lse2(state[r]);
      if (state[r].sum == 0.0f) continue;
      float* out = &out_[static_cast<std::size_t>((partial + r) * kKvLoraRank)];
      for (std::int64_t d = 0; d < kKvLoraRank; ++d) out[d] /= state[r].sum;
    }
  }

  void load_keys(std::int64_t b, std::int64_t begin, std::int64_t end, bool fp8, Scratch& s) const {
    const std::int32_t* table = a_.block_table.row<std::int32_t>(b);
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t page = table[t / kPageSize], j = t - begin;
      read_key(a_.cache, page, t % kPageSize, &s.keys[static_cast<std::size_t>(j * kKeyWidth)]);
      s.scale[j] = read_scale(a_.cache, page, t % kPageSize);
      s.log2_scale[j] = fp8 ? numeric::log2_scale(s.scale[j]) : 0.0f;
    }
  }

  void attend_row(const float* query, float factor, std::int64_t n, bool fp8, Scratch& s,
                  numeric::RowState& state, float* out) const {
    dot_rows(query, s.keys.data(), kKeyWidth, kKeyWidth, n, s.y);
    float maximum = -kInf;
    bool has_nan = false;
    for (std::int64_t j = 0; j < n; ++j) {
      s.y[j] = s.y[j] * s.scale[j] * factor + s.log2_scale[j];
      has_nan = has_nan || std::isnan(s.y[j]);
      maximum = std::fmax(maximum, s.y[j]);
    }
    const numeric::BlockFactors f = numeric::begin_block(state, maximum, has_nan);
    if (f.skip) return;
    float sum = 0;
    for (std::int64_t j = 0; j < n; ++j) {
      s.y[j] = fp8 ? numeric::e4m3_to_float(numeric::quantize_p(s.y[j], f.maximum))
                   : numeric::kE4M3Max * std::exp2(s.y[j] - f.maximum);
      sum += s.y[j] / s.scale[j];
    }
    state.sum += f.sigma * sum;
    if (fp8 && !a_.numerics.two_level_accumulation) {
      // One accumulator for the whole split; in f32 this differs from two levels in rounding only.
      scale_add(out, out, f.rescale, 0.0f, kKvLoraRank);
      for (std::int64_t j = 0; j < n; ++j)
        scale_add(out, key(s, j), 1.0f, f.sigma * s.y[j], kKvLoraRank);
      return;
    }
    std::fill(s.values.begin(), s.values.end(), 0.0f);
    for (std::int64_t j = 0; j < n; ++j)
      scale_add(s.values.data(), key(s, j), 1.0f, s.y[j], kKvLoraRank);
    scale_add(out, s.values.data(), f.rescale, f.sigma, kKvLoraRank);
  }

  static const float* key(const Scratch& s, std::int64_t j) {
    return &s.keys[static_cast<std::size_t>(j * kKeyWidth)];
  }

  // O = sum w_s O_s / sum w_s with w_s = 2^(lse2_s - max). Splits of weight zero are not touched.
  void combine(std::int64_t b, std::int64_t row) const {
    const std::int64_t rows = seqlen_q_ * heads_;
    const std::int64_t first = first_partial_[static_cast<std::size_t>(b)],
                       end = first_partial_[static_cast<std::size_t>(b) + 1];
    float m = -kInf, weights = 0;
    bool has_nan = false;
    for (std::int64_t p = first + row; p < end; p += rows) {
      m = std::fmax(m, lse2_[static_cast<std::size_t>(p)]);
      has_nan = has_nan || std::isnan(lse2_[static_cast<std::size_t>(p)]);
    }
    float out[kKvLoraRank] = {};
    float lse2 = -kInf;
    if (m != -kInf || has_nan) {
      for (std::int64_t p = first + row; p < end; p += rows) {
        const float w = std::exp2(lse2_[static_cast<std::size_t>(p)] - m);
        if (w == 0.0f) continue;
        weights += w;
        scale_add(out, &out_[static_cast<std::size_t>(p * kKvLoraRank)], 1.0f, w, kKvLoraRank);
      }
      for (float& o : out) o /= weights;
      lse2 = m + std::log2(weights);
    }
    const std::int64_t at =
        b * a_.out.stride(0) + row / heads_ * a_.out.stride(1) + row % heads_ * a_.out.stride(2);
    for (std::int64_t d = 0; d < kKvLoraRank; ++d)
      ops::store(a_.out.raw(), a_.out.dtype(), at + d, out[d]);
    if (a_.lse.raw()) a_.lse.row<float>(b, row % heads_)[row / heads_] = numeric::kLn2 * lse2;
  }

  const MlaDecodeArgs& a_;
  const std::int64_t seqlen_q_, heads_;
  std::vector<Item> items_;
  std::vector<std::int64_t> first_partial_;  // [batch + 1]
  std::int64_t num_partials_ = 0;
  std::vector<float> out_, lse2_;  // [partials, 512], [partials]
};

}  // namespace

void mla_decode(ThreadPool& pool, const MlaDecodeArgs& a) { Decode(a).run(pool); }

}  // namespace snapmla::cpu
