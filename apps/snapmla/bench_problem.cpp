#include "bench_problem.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>
#include <random>
#include <string>

#include "base/check.h"
#include "engine/backend_factory.h"
#include "ops/element.h"
#include "ops/ops.h"

namespace snapmla::app::bench {
namespace {

constexpr std::int64_t kColdBytes = 128ll << 20;  // several times any last-level cache share
constexpr std::int64_t kMaxCopies = 256;
constexpr float kSoftmaxScale = 0.07216878364870322f;  // (128 + 64)^-0.5

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

// Uniform numbers of variance 1, fast enough for gigabytes (xorshift64*).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}
  void fill(std::vector<float>& to) {
    for (float& x : to) {
      state_ ^= state_ >> 12;
      state_ ^= state_ << 25;
      state_ ^= state_ >> 27;
      const auto high = static_cast<std::uint32_t>((state_ * 0x2545f4914f6cdd1dull) >> 32);
      x = (static_cast<float>(high >> 8) * 0x1p-24f - 0.5f) * 3.4641016f;
    }
  }

 private:
  std::uint64_t state_;
};

void check_memory(std::int64_t bytes) {
  std::ifstream info("/proc/meminfo");
  std::string word;
  std::int64_t kib = 0;
  while (info >> word) {
    if (word != "MemAvailable:") continue;
    info >> kib;
    if (bytes > kib * 1024) {
      throw Error(ErrorCode::kOutOfMemory, str("bench: the caches need ", bytes >> 20, " MiB, but ",
                                               kib >> 10, " MiB are available"));
    }
    return;
  }
}

// Random keys into the first copy, page by page; the other copies get the same bytes.
void fill_pool(const AttentionCase& c, AttentionData& data, ops::OpSet& ops) {
  const std::int64_t page_bytes = page_layout(c.format).page_bytes;
  const KvCacheView cache = KvCacheView::of_pool(data.pool.data(), data.num_pages, c.format);
  std::vector<float> latent(kPageSize * kKvLoraRank), rope(kPageSize * kQkRopeHeadDim);
  std::vector<std::int64_t> slots(kPageSize);
  const std::int64_t pages = c.batch * data.max_pages;
  Random random(3);
  for (std::int64_t i = 0; i < pages; ++i) {
    random.fill(latent);
    random.fill(rope);
    const std::int64_t page = data.tables[sz(i)];
    std::iota(slots.begin(), slots.end(), page * kPageSize);
    ops::append_kv(ops, {TensorView::of(latent.data(), {kPageSize, kKvLoraRank}),
                         TensorView::of(rope.data(), {kPageSize, kQkRopeHeadDim}),
                         TensorView::of(slots.data(), {kPageSize}), cache});
    for (std::int64_t copy = 1; copy < data.copies; ++copy) {
      std::copy_n(data.pool.data() + page * page_bytes, page_bytes,
                  data.pool.data() + data.tables[sz(copy * pages + i)] * page_bytes);
    }
  }
}

void fill_queries(const AttentionCase& c, AttentionData& data, ops::OpSet& ops) {
  std::vector<float> latent(sz(c.rows() * kKvLoraRank)), rope(sz(c.rows() * kQkRopeHeadDim));
  Random random(5);
  random.fill(latent);
  random.fill(rope);
  if (c.format == KvCacheFormat::kF32) {
    const auto bytes = [](const std::vector<float>& x) {
      const auto* from = reinterpret_cast<const std::uint8_t*>(x.data());
      return std::vector<std::uint8_t>(from, from + x.size() * sizeof(float));
    };
    data.q_latent = bytes(latent);
    data.q_rope = bytes(rope);
    return;
  }
  data.q_rope.resize(rope.size() * 2);
  if (c.format == KvCacheFormat::kBf16) {
    data.q_latent.resize(latent.size() * 2);
    std::transform(latent.begin(), latent.end(), reinterpret_cast<BFloat16*>(data.q_latent.data()),
                   numeric::bf16_from_float);
    std::transform(rope.begin(), rope.end(), reinterpret_cast<BFloat16*>(data.q_rope.data()),
                   numeric::bf16_from_float);
    return;
  }
  data.q_latent.resize(latent.size());
  data.q_scale.resize(sz(c.rows()));
  const auto shape = [&](const void* p, DType type, std::int64_t width) {
    return TensorView(p, type, {c.batch, c.seqlen_q, c.heads, width});
  };
  ops::quantize_q(ops, {shape(latent.data(), DType::kF32, kKvLoraRank),
                        shape(rope.data(), DType::kF32, kQkRopeHeadDim),
                        shape(data.q_latent.data(), DType::kE4M3, kKvLoraRank),
                        shape(data.q_rope.data(), DType::kBF16, kQkRopeHeadDim),
                        TensorView::of(data.q_scale.data(), {c.batch, c.seqlen_q, c.heads})});
}

struct Row {
  std::int64_t request, token, head;
};

// The same arguments for one row of the batch.
MlaDecodeArgs one_row(MlaDecodeArgs a, const AttentionCase& c, const Row& row, float* out,
                      float* lse) {
  const std::int64_t at = (row.request * c.seqlen_q + row.token) * c.heads + row.head;
  const auto cut = [&](const TensorView& t) {
    const std::int64_t width = t.dim(3);
    return TensorView(
        t.data<std::uint8_t>() + at * width * static_cast<std::int64_t>(size_of(t.dtype())),
        t.dtype(), {1, 1, 1, width});
  };
  a.q_latent = cut(a.q_latent);
  a.q_rope = cut(a.q_rope);
  if (a.q_scale.raw()) a.q_scale = TensorView::of(a.q_scale.data<float>() + at, {1, 1, 1});
  a.block_table =
      TensorView::of(a.block_table.row<std::int32_t>(row.request), {1, a.block_table.dim(1)});
  a.out = TensorView::of(out, {1, 1, 1, kKvLoraRank});
  a.lse = TensorView::of(lse, {1, 1, 1});
  return a;
}

// Attention of one row in fp64, over keys that fetch_dequant read back.
void attend_fp64(ops::OpSet& ops, const MlaDecodeArgs& a, std::int64_t keys, float* out,
                 float* lse) {
  std::vector<float> latent(sz(keys * kKvLoraRank)), rope(sz(keys * kQkRopeHeadDim));
  ops::fetch_dequant(
      ops, {a.cache, TensorView::of(a.block_table.data<std::int32_t>(), {a.block_table.dim(1)}), 0,
            keys, TensorView::of(latent.data(), {keys, kKvLoraRank}),
            TensorView::of(rope.data(), {keys, kQkRopeHeadDim})});
  const double q_scale = a.q_scale.raw() ? *a.q_scale.data<float>() : 1.0;
  std::vector<double> q, score(sz(keys)), sum(kKvLoraRank, 0.0);
  for (std::int64_t d = 0; d < kKvLoraRank; ++d)
    q.push_back(q_scale * ops::load(a.q_latent.raw(), a.q_latent.dtype(), d));
  for (std::int64_t d = 0; d < kQkRopeHeadDim; ++d)
    q.push_back(q_scale * ops::load(a.q_rope.raw(), a.q_rope.dtype(), d));
  for (std::int64_t j = 0; j < keys; ++j) {
    const float *k = &latent[sz(j * kKvLoraRank)], *r = &rope[sz(j * kQkRopeHeadDim)];
    score[sz(j)] =
        a.softmax_scale * (std::inner_product(k, k + kKvLoraRank, q.begin(), 0.0) +
                           std::inner_product(r, r + kQkRopeHeadDim, q.begin() + kKvLoraRank, 0.0));
  }
  const double m = *std::max_element(score.begin(), score.end());
  double total = 0;
  for (std::int64_t j = 0; j < keys; ++j) {
    const double w = std::exp(score[sz(j)] - m);
    total += w;
    for (std::int64_t d = 0; d < kKvLoraRank; ++d)
      sum[sz(d)] += w * latent[sz(j * kKvLoraRank + d)];
  }
  for (std::int64_t d = 0; d < kKvLoraRank; ++d) out[d] = static_cast<float>(sum[sz(d)] / total);
  *lse = static_cast<float>(m + std::log(total));
}

}  // namespace

double AttentionCase::flops() const {
  double pairs = 0;
  for (std::int64_t t = 0; t < seqlen_q; ++t) {
    pairs += static_cast<double>(batch * heads * (context - seqlen_q + t + 1));
  }
  return 2.0 * (kKvLoraRank + kQkRopeHeadDim + kKvLoraRank) * pairs;
}

double AttentionCase::cache_bytes() const {
  return static_cast<double>(batch * context * (page_layout(format).page_bytes / kPageSize));
}

MlaDecodeArgs AttentionData::args(const AttentionCase& c, std::int64_t copy, float* out,
                                  float* lse) {
  MlaDecodeArgs a;
  const bool fp8 = c.format == KvCacheFormat::kFp8;
  const DType plain = c.format == KvCacheFormat::kF32 ? DType::kF32 : DType::kBF16;
  const auto shape = [&](const void* p, DType type, std::int64_t width) {
    return TensorView(p, type, {c.batch, c.seqlen_q, c.heads, width});
  };
  a.q_latent = shape(q_latent.data(), fp8 ? DType::kE4M3 : plain, kKvLoraRank);
  a.q_rope = shape(q_rope.data(), plain, kQkRopeHeadDim);
  if (fp8) a.q_scale = TensorView::of(q_scale.data(), {c.batch, c.seqlen_q, c.heads});
  a.cache = KvCacheView::of_pool(pool.data(), num_pages, c.format);
  a.block_table = TensorView::of(tables.data() + copy * c.batch * max_pages, {c.batch, max_pages});
  a.cache_seqlens = TensorView::of(seqlens.data(), {c.batch});
  a.softmax_scale = softmax_scale;
  a.out = shape(out, DType::kF32, kKvLoraRank);
  a.lse = TensorView::of(lse, {c.batch, c.heads, c.seqlen_q});
  return a;
}

AttentionData make_attention_data(const AttentionCase& c) {
  AttentionData data;
  const std::int64_t page_bytes = page_layout(c.format).page_bytes;
  data.max_pages = (c.context + kPageSize - 1) / kPageSize;
  const std::int64_t pages = c.batch * data.max_pages;
  data.copies = std::clamp<std::int64_t>(kColdBytes / (pages * page_bytes) + 1, 1, kMaxCopies);
  data.num_pages = pages * data.copies;
  check_memory(data.num_pages * page_bytes);
  data.pool.resize(sz(data.num_pages * page_bytes));
  data.tables.resize(sz(data.num_pages));
  std::iota(data.tables.begin(), data.tables.end(), 0);
  std::shuffle(data.tables.begin(), data.tables.end(), std::mt19937(11));
  data.seqlens.assign(sz(c.batch), static_cast<std::int32_t>(c.context));
  data.softmax_scale = kSoftmaxScale;
  const std::unique_ptr<ops::OpSet> ops = engine::make_backend("cpu", 0);
  fill_pool(c, data, *ops);
  fill_queries(c, data, *ops);
  return data;
}

double verify(const AttentionCase& c, AttentionData& data, const AttentionResult& result,
              bool independent) {
  const bool fp8 = c.format == KvCacheFormat::kFp8;
  const double bound = independent ? (fp8 ? 5e-2 : 1e-4) : 2e-3;
  const double lse_bound = independent ? (fp8 ? 6e-2 : 1e-4) : 1e-3;
  const std::unique_ptr<ops::OpSet> ops = engine::make_backend(independent ? "cpu" : "ref", 0);
  const MlaDecodeArgs all = data.args(c, 0, nullptr, nullptr);
  double worst = 0;
  for (const Row& row : {Row{0, 0, 0}, Row{0, c.seqlen_q - 1, 0}, Row{c.batch - 1, 0, c.heads - 1},
                         Row{c.batch / 2, c.seqlen_q / 2, c.heads / 2}}) {
    std::vector<float> want(kKvLoraRank);
    float want_lse = 0;
    // Alone, the row is the last of a request that ends where the row's view of the keys does.
    std::int32_t keys = static_cast<std::int32_t>(c.context - c.seqlen_q + row.token + 1);
    MlaDecodeArgs a = one_row(all, c, row, want.data(), &want_lse);
    a.cache_seqlens = TensorView::of(&keys, {1});
    if (independent) {
      attend_fp64(*ops, a, keys, want.data(), &want_lse);
    } else {
      ops::mla_decode(*ops, a);
    }
    const float* got =
        &result
             .out[sz(((row.request * c.seqlen_q + row.token) * c.heads + row.head) * kKvLoraRank)];
    const float got_lse =
        result.lse[sz((row.request * c.heads + row.head) * c.seqlen_q + row.token)];
    double difference = 0, size = 0;
    for (std::int64_t d = 0; d < kKvLoraRank; ++d) {
      difference += std::pow(static_cast<double>(got[d]) - want[sz(d)], 2);
      size += std::pow(static_cast<double>(want[sz(d)]), 2);
    }
    const double error = std::sqrt(difference / size);
    if (!(error <= bound) || !(std::fabs(got_lse - want_lse) <= lse_bound)) {
      throw Error(ErrorCode::kInternal,
                  str("bench: wrong result for request ", row.request, ", token ", row.token,
                      ", head ", row.head, ": relative error ", error, " (accepted ", bound,
                      "), lse ", got_lse, " instead of ", want_lse));
    }
    worst = std::max(worst, error);
  }
  return worst;
}

}  // namespace snapmla::app::bench
