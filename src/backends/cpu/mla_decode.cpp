// Absorbed decode on the host. A work item is (request, split, group of up to 16 rows): it unpacks
// each block of keys to f32 once and runs all its rows over it as two small GEMMs with the softmax
// of numeric/softmax.h between them. Splits depend on the length alone, so a row's bits depend
// neither on the batch nor on the threads.
#include <cmath>
#include <limits>
#include <vector>

#include "backends/cpu/attention_kernels.h"
#include "backends/cpu/cpu_ops.h"
#include "backends/cpu/kernels.h"
#include "backends/cpu/study.h"
#include "numeric/softmax.h"
#include "numeric/tensor_core.h"
#include "ops/element.h"
#include "plan/split.h"

namespace snapmla::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
struct Item {
  std::int64_t request, split, first_row, num_rows;
};

// Scratch of one thread: 0.3 MB of keys at p_block 128, which stay in the second-level cache.
struct Scratch {
  std::vector<float> keys = std::vector<float>(kMaxBlock * kKeyWidth);
  std::vector<float> queries = std::vector<float>(kRowLanes * kKeyWidth);
  std::vector<float> values = std::vector<float>(kRowLanes * kKvLoraRank);
  std::vector<float> scores = std::vector<float>(kMaxBlock * kRowLanes);
  float scale[kMaxBlock], log2_scale[kMaxBlock];
};

class Decode {
 public:
  // study: the page holds values instead of codes, and P is treated as it says.
  explicit Decode(const MlaDecodeArgs& a, const ops::StudyNumerics* study = nullptr)
      : a_(a),
        study_(study),
        p_block_(study ? study->p_block : a.numerics.p_block),
        scaled_(study || a.cache.format == KvCacheFormat::kFp8),
        quantise_(study ? study->quantise_p : scaled_),
        seqlen_q_(a.q_latent.dim(1)),
        heads_(a.q_latent.dim(2)) {
    const std::int64_t batch = a.q_latent.dim(0), rows = seqlen_q_ * heads_;
    for (std::int64_t b = 0; b < batch; ++b) {
      first_partial_.push_back(num_partials_);
      const std::int64_t splits = plan::num_splits(length(b), a.num_splits);
      for (std::int64_t s = 0; s < splits; ++s) {
        for (std::int64_t r = 0; r < rows; r += kRowLanes)
          items_.push_back({b, s, r, std::min(kRowLanes, rows - r)});
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

  // unscale undoes what load_keys did to the latent part (powers of two: exact).
  void load_query(std::int64_t b, std::int64_t row, float* to, float unscale) const {
    const auto read = [&](const TensorView& t, std::int64_t width, float* out) {
      const std::int64_t at =
          b * t.stride(0) + row / heads_ * t.stride(1) + row % heads_ * t.stride(2);
      if (t.dtype() == DType::kE4M3) {
        decode_e4m3(t.data<Float8E4M3>() + at, unscale, out, width);
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
    const std::int64_t rows = seqlen_q_ * heads_, length = this->length(item.request);
    const float unscale = latent_unscale(a_.cache.format);
    const std::int64_t partial =
        first_partial_[static_cast<std::size_t>(item.request)] + item.split * rows + item.first_row;
    float* out = &out_[static_cast<std::size_t>(partial * kKvLoraRank)];
    RowBlock block;
    block.rows = item.num_rows;
    for (std::int64_t r = 0; r < item.num_rows; ++r) {
      load_query(item.request, item.first_row + r,
                 &s.queries[static_cast<std::size_t>(r * kKeyWidth)], unscale);
      block.factor[r] = row_factor(item.request, item.first_row + r);
    }
    const plan::PageRange range =
        plan::split_pages(length, plan::num_splits(length, a_.num_splits), item.split, p_block_);
    const std::int64_t step = p_block_ / kPageSize;
    for (std::int64_t page = range.begin; page < range.end; page += step) {
      const std::int64_t begin = page * kPageSize;
      const std::int64_t n = std::min(std::min(page + step, range.end) * kPageSize, length) - begin;
      for (std::int64_t r = 0; r < item.num_rows; ++r) {
        const std::int64_t seen = length - seqlen_q_ + (item.first_row + r) / heads_ + 1 - begin;
        block.visible[r] = static_cast<std::int32_t>(std::clamp<std::int64_t>(seen, 0, n));
      }
      read_block(item.request, begin, n, s);
      scores(s.queries.data(), kKeyWidth, block.rows, s.keys.data(), kKeyWidth, n, kKeyWidth, false,
             s.scores.data());
      softmax(block, n, scaled_ ? s.scale : nullptr, s.log2_scale, quantise_, s.scores.data());
      add_values(block, s, unscale, out);
    }
    for (std::int64_t r = 0; r < item.num_rows; ++r, out += kKvLoraRank) {
      lse2_[static_cast<std::size_t>(partial + r)] = numeric::row_lse2(block.state[r]);
      if (block.state[r].sum == 0.0f) continue;
      for (std::int64_t d = 0; d < kKvLoraRank; ++d) out[d] /= block.state[r].sum;
    }
  }

  void add_values(const RowBlock& block, Scratch& s, float unscale, float* out) const {
    using ops::Accumulation;
    const Accumulation how = study_ ? study_->accumulation
                             : scaled_ && !a_.numerics.two_level_accumulation
                                 ? Accumulation::kOneLevel
                                 : Accumulation::kTwoLevel;
    if (how == Accumulation::kTwoLevel || how == Accumulation::kOneLevel) {
      values(block, s.scores.data(), s.keys.data(), kKeyWidth, kKvLoraRank, unscale,
             how == Accumulation::kOneLevel, s.values.data(), out, kKvLoraRank);
    } else {
      tensor_core_values(block, s.scores.data(), s.keys.data(), kKeyWidth,
                         how == Accumulation::kTensorCoreOneLevel, out, kKvLoraRank);
    }
  }

  // Tokens [begin, begin + n) of a request to s.keys, and their scales.
  void read_block(std::int64_t b, std::int64_t begin, std::int64_t n, Scratch& s) const {
    const std::int32_t* table = a_.block_table.row<std::int32_t>(b);
    for (std::int64_t t = 0; t < n; t += kPageSize) {
      const std::int64_t page = table[(begin + t) / kPageSize],
                         count = std::min<std::int64_t>(kPageSize, n - t);
      float* keys = &s.keys[static_cast<std::size_t>(t * kKeyWidth)];
      load_keys(a_.cache, page, 0, count, keys);
      if (!scaled_) continue;
      for (std::int64_t j = 0; j < count; ++j, keys += kKeyWidth) {
        s.scale[t + j] = a_.cache.scale_plane(page)[j];
        s.log2_scale[t + j] = numeric::log2_scale(s.scale[t + j]);
        if (!study_) continue;
        // f32(code * scale) / scale: the codes once more, where the rule stored any.
        for (std::int64_t d = 0; d < kKvLoraRank; ++d)
          keys[d] = numeric::snap_to_e4m3(keys[d] / s.scale[t + j]);
        for (std::int64_t d = kKvLoraRank; d < kKeyWidth; ++d) keys[d] /= s.scale[t + j];
      }
    }
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
  const ops::StudyNumerics* const study_;
  const int p_block_;
  const bool scaled_, quantise_;  // tokens have scales; P is rounded
  const std::int64_t seqlen_q_, heads_;
  std::vector<Item> items_;
  std::vector<std::int64_t> first_partial_;  // [batch + 1]
  std::int64_t num_partials_ = 0;
  std::vector<float> out_, lse2_;  // [partials, 512], [partials]
};

}  // namespace

void mla_decode(ThreadPool& pool, const MlaDecodeArgs& a) { Decode(a).run(pool); }

void study_decode(ThreadPool& pool, const ops::StudyDecodeArgs& a) {
  Decode(a.decode, &a.numerics).run(pool);
}

}  // namespace snapmla::cpu
