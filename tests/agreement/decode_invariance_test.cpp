// What must not change a bit of a decoded row: the number of threads, the other requests of the
// batch, the other heads. And every instruction set that the processor has, down to the scalar
// fallback, must agree with the reference.
#include <gtest/gtest.h>

#include <hwy/targets.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/kernels.h"
#include "backends/ref/ref_backend.h"
#include "numeric/float_types.h"

namespace snapmla {
namespace {

struct Decoded {
  std::vector<float> out, lse;  // [batch, seqlen_q, heads, 512], [batch, heads, seqlen_q]
};

// Requests over one pool of shuffled pages, with queries in the cache's own number system.
class Batch {
 public:
  Batch(KvCacheFormat format, std::vector<std::int32_t> lengths, std::int64_t seqlen_q,
        std::int64_t heads)
      : format_(format), lengths_(std::move(lengths)), seqlen_q_(seqlen_q), heads_(heads) {
    std::mt19937 rng(7);
    std::normal_distribution<float> normal;
    for (std::int32_t n : lengths_) max_pages_ = std::max<std::int64_t>(max_pages_, (n + 63) / 64);
    const std::int64_t pages = max_pages_ * requests();
    table_.resize(static_cast<std::size_t>(pages));
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), rng);
    pool_.assign(static_cast<std::size_t>(pages * page_layout(format).page_bytes), 0xff);
    const auto ref = ref::make_ref_backend();
    std::vector<float> latent, rope;
    std::vector<std::int64_t> slots;
    for (std::int64_t b = 0; b < requests(); ++b) {
      for (std::int64_t t = 0; t < length(b); ++t) {
        slots.push_back(table_[static_cast<std::size_t>(b * max_pages_ + t / 64)] * 64ll + t % 64);
        for (int d = 0; d < kKvLoraRank; ++d) latent.push_back(normal(rng));
        for (int d = 0; d < kQkRopeHeadDim; ++d) rope.push_back(4 * normal(rng));
      }
    }
    const auto tokens = static_cast<std::int64_t>(slots.size());
    ref->append_kv({TensorView::of(latent.data(), {tokens, kKvLoraRank}),
                    TensorView::of(rope.data(), {tokens, kQkRopeHeadDim}),
                    TensorView::of(slots.data(), {tokens}), cache()});
    const std::int64_t rows = requests() * seqlen_q * heads;
    for (std::int64_t i = 0; i < rows * kKvLoraRank; ++i) q_.push_back(normal(rng));
    for (std::int64_t i = 0; i < rows * kQkRopeHeadDim; ++i) q_rope_.push_back(normal(rng));
    codes_.resize(q_.size());
    rope16_.resize(q_rope_.size());
    scale_.resize(static_cast<std::size_t>(rows));
    const auto view = [&](const auto* data, std::int64_t width) {
      return TensorView::of(data, {requests(), seqlen_q_, heads_, width});
    };
    if (format == KvCacheFormat::kFp8) {
      ref->quantize_q({view(q_.data(), 512), view(q_rope_.data(), 64), view(codes_.data(), 512),
                       view(rope16_.data(), 64),
                       TensorView::of(scale_.data(), {requests(), seqlen_q_, heads_})});
    }
  }

  std::int64_t requests() const { return static_cast<std::int64_t>(lengths_.size()); }
  std::int64_t length(std::int64_t b) const { return lengths_[static_cast<std::size_t>(b)]; }
  KvCacheView cache() {
    return KvCacheView::of_pool(pool_.data(), max_pages_ * requests(), format_);
  }

  // Requests [b, b + n), heads [h, h + m).
  Decoded decode(ops::OpSet& backend, std::int64_t b, std::int64_t n, std::int64_t h,
                 std::int64_t m, int num_splits = 0) {
    const auto first = b * seqlen_q_ * heads_ + h;
    const auto view = [&](const auto* data, std::int64_t width) {
      return TensorView::of(data + first * width, {n, seqlen_q_, m, width})
          .with_stride(0, seqlen_q_ * heads_ * width)
          .with_stride(1, heads_ * width);
    };
    Decoded r;
    r.out.assign(static_cast<std::size_t>(n * seqlen_q_ * m * kKvLoraRank), NAN);
    r.lse.assign(static_cast<std::size_t>(n * seqlen_q_ * m), NAN);
    MlaDecodeArgs a;
    if (format_ == KvCacheFormat::kFp8) {
      a.q_latent = view(codes_.data(), 512);
      a.q_rope = view(rope16_.data(), 64);
      a.q_scale = TensorView::of(scale_.data() + first, {n, seqlen_q_, m})
                      .with_stride(0, seqlen_q_ * heads_)
                      .with_stride(1, heads_);
    } else {
      a.q_latent = view(q_.data(), 512);
      a.q_rope = view(q_rope_.data(), 64);
    }
    a.cache = cache();
    a.block_table = TensorView::of(table_.data() + b * max_pages_, {n, max_pages_});
    a.cache_seqlens = TensorView::of(lengths_.data() + b, {n});
    a.softmax_scale = 0.05f;
    a.out = TensorView::of(r.out.data(), {n, seqlen_q_, m, kKvLoraRank});
    a.lse = TensorView::of(r.lse.data(), {n, m, seqlen_q_});
    a.num_splits = num_splits;
    backend.mla_decode(a);
    return r;
  }

 private:
  KvCacheFormat format_;
  std::vector<std::int32_t> lengths_;
  std::int64_t seqlen_q_, heads_, max_pages_ = 0;
  std::vector<std::int32_t> table_;
  std::vector<std::uint8_t> pool_;
  std::vector<float> q_, q_rope_, scale_;
  std::vector<Float8E4M3> codes_;
  std::vector<BFloat16> rope16_;
};

void expect_same_bits(const std::vector<float>& got, const float* want, const char* what) {
  EXPECT_EQ(std::memcmp(got.data(), want, got.size() * sizeof(float)), 0) << what;
}

class DecodeInvariance : public ::testing::TestWithParam<KvCacheFormat> {};

TEST_P(DecodeInvariance, ThreadsBatchAndHeadsDoNotChangeARow) {
  const std::int64_t seqlen_q = 3, heads = 13;
  Batch batch(GetParam(), {1100, 2, 640, 65}, seqlen_q, heads);
  const auto one = cpu::make_cpu_backend(1), three = cpu::make_cpu_backend(3);
  const Decoded all = batch.decode(*one, 0, 4, 0, heads);
  ASSERT_TRUE(std::none_of(all.out.begin(), all.out.end(), [](float x) { return std::isnan(x); }));
  expect_same_bits(batch.decode(*three, 0, 4, 0, heads).out, all.out.data(), "three threads");
  for (std::int64_t b = 0; b < batch.requests(); ++b) {
    const float* want = all.out.data() + b * seqlen_q * heads * kKvLoraRank;
    const Decoded alone = batch.decode(*three, b, 1, 0, heads);
    expect_same_bits(alone.out, want, "request alone");
    expect_same_bits(alone.lse, all.lse.data() + b * heads * seqlen_q, "lse of a request alone");
    for (std::int64_t h = 0; h < heads; ++h) {
      const Decoded head = batch.decode(*one, b, 1, h, 1);
      for (std::int64_t t = 0; t < seqlen_q; ++t) {
        EXPECT_EQ(std::memcmp(head.out.data() + t * kKvLoraRank,
                              want + (t * heads + h) * kKvLoraRank, kKvLoraRank * sizeof(float)),
                  0)
            << "request " << b << " token " << t << " head " << h << " alone";
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, DecodeInvariance,
                         ::testing::Values(KvCacheFormat::kFp8, KvCacheFormat::kF32));

// Restores the processor's own choice at the end of a test.
class SimdTargets : public ::testing::TestWithParam<KvCacheFormat> {
 protected:
  ~SimdTargets() override { use(0); }
  static void use(std::int64_t targets) {
    hwy::SetSupportedTargetsForTest(targets);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

TEST_P(SimdTargets, EachAgreesWithRef) {
  Batch batch(GetParam(), {130, 700}, 2, 11);
  const auto ref = ref::make_ref_backend(), cpu = cpu::make_cpu_backend(2);
  const Decoded want = batch.decode(*ref, 0, 2, 0, 11);
  std::vector<std::string> seen;
  for (std::int64_t targets = hwy::SupportedTargets(); targets != 0; targets &= targets - 1) {
    use(targets & -targets);
    const std::string name = cpu::simd_target();
    if (std::find(seen.begin(), seen.end(), name) != seen.end()) continue;  // not compiled
    seen.push_back(name);
    const Decoded got = batch.decode(*cpu, 0, 2, 0, 11);
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < got.out.size(); ++i) {
      difference += std::pow(static_cast<double>(got.out[i]) - want.out[i], 2);
      size += std::pow(static_cast<double>(want.out[i]), 2);
    }
    const bool exact = GetParam() == KvCacheFormat::kF32;
    EXPECT_LE(std::sqrt(difference / size), exact ? 1e-5 : 2e-3) << name;
    for (std::size_t i = 0; i < got.lse.size(); ++i)
      EXPECT_NEAR(got.lse[i], want.lse[i], exact ? 1e-5 : 1e-3) << name;
  }
  EXPECT_GE(seen.size(), 2u) << "no fallback was compiled";
}

INSTANTIATE_TEST_SUITE_P(Formats, SimdTargets,
                         ::testing::Values(KvCacheFormat::kFp8, KvCacheFormat::kF32));

}  // namespace
}  // namespace snapmla
