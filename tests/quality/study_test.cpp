// The study operations: the scheme's own rule and settings give what the real operations give, and
// every other rule is held against a computation of its own.
#include <gtest/gtest.h>

#include <array>

#include "backends/cpu/cpu_backend.h"
#include "backends/ref/ref_backend.h"
#include "quality/study_problem.h"

namespace snapmla::quality {
namespace {

using numeric::StoreFault;
using numeric::StoreRule;
using numeric::StoreScale;
using ops::Accumulation;

std::unique_ptr<ops::OpSet> cpu_ops() { return cpu::make_cpu_backend(2); }

// Nearest e4m3 value by trying all of them; ties to the even code, beyond the ends the end.
double nearest_e4m3(double x) {
  static const std::vector<double> values = [] {
    std::vector<double> list;
    for (int code = 0; code < 0x7f; ++code) {
      const int exponent = code >> 3, mantissa = code & 7;
      list.push_back(exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9));
    }
    return list;
  }();
  const double m = std::fabs(x);
  std::size_t best = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double d = std::fabs(values[i] - m), b = std::fabs(values[best] - m);
    if (d < b || (d == b && i % 2 == 0)) best = i;
  }
  return std::copysign(values[best], x);
}

// Dequantised latent and rope, [tokens, 576], through the real fetch of each sequence's pages.
std::vector<float> fetch(StudyProblem& p, ops::OpSet& ops, const KvCacheView& cache) {
  std::vector<float> all;
  std::int64_t done = 0;
  const std::vector<std::int32_t> table = [&] {
    std::vector<std::int32_t> t(static_cast<std::size_t>(p.num_pages));
    std::iota(t.begin(), t.end(), 0);
    return t;
  }();
  std::vector<float> latent(kKvLoraRank), rope(kQkRopeHeadDim);
  for (; done < p.tokens(); ++done) {
    const std::int64_t slot = p.slots[static_cast<std::size_t>(done)];
    ops.fetch_dequant({cache, TensorView::of(table.data(), {p.num_pages}), slot, slot + 1,
                       TensorView::of(latent.data(), {1, kKvLoraRank}),
                       TensorView::of(rope.data(), {1, kQkRopeHeadDim})});
    all.insert(all.end(), latent.begin(), latent.end());
    all.insert(all.end(), rope.begin(), rope.end());
  }
  return all;
}

// What a rule should give for one token: 576 values.
using Expected = std::function<std::vector<double>(const float* latent, const float* rope)>;

void expect_rule(const StoreRule& rule, KvCacheFormat format, const Expected& expected,
                 double tolerance) {
  const auto ops = cpu_ops();
  StudyProblem p({}, 7, *ops);
  const std::vector<float> got = fetch(p, *ops, p.fill(format, &rule));
  double worst = 0, top = 0;
  for (std::int64_t t = 0; t < p.tokens(); ++t) {
    const std::vector<double> want =
        expected(&p.latent[static_cast<std::size_t>(t * kKvLoraRank)],
                 &p.rope[static_cast<std::size_t>(t * kQkRopeHeadDim)]);
    for (std::size_t d = 0; d < 576; ++d) {
      const double x = got[static_cast<std::size_t>(t) * 576 + d];
      worst = std::max(worst, std::fabs(x - want[d]) / std::max(1e-3, std::fabs(want[d])));
      top = std::max(top, std::fabs(want[d]));
    }
  }
  EXPECT_LT(worst, tolerance);
  EXPECT_GT(top, 1.0) << "the case holds nothing";
}

double amax(const float* x, int n) {
  double m = 0;
  for (int i = 0; i < n; ++i) m = std::max(m, std::fabs(static_cast<double>(x[i])));
  return m;
}

TEST(StudyAppend, TheSchemesRuleWritesTheBytesOfAppend) {
  const auto cpu = cpu_ops(), ref = ref::make_ref_backend();
  for (ops::OpSet* ops : {cpu.get(), ref.get()}) {
    StudyProblem p({}, 3, *ops);
    const StoreRule rule;
    EXPECT_EQ(p.bytes(p.fill(KvCacheFormat::kFp8, &rule)),
              p.bytes(p.fill(KvCacheFormat::kFp8, nullptr)));
  }
}

TEST(StudyAppend, JointScaleQuantisesRopeWithTheLatent) {
  StoreRule rule;
  rule.scale = StoreScale::kJoint;
  rule.rope_e4m3 = true;
  expect_rule(
      rule, KvCacheFormat::kFp8,
      [](const float* latent, const float* rope) {
        const double s = static_cast<float>(std::max(amax(latent, 512), amax(rope, 64)) / 448.0);
        std::vector<double> want;
        for (int d = 0; d < 512; ++d)
          want.push_back(nearest_e4m3(latent[d] / static_cast<float>(s)) * s);
        for (int d = 0; d < 64; ++d)
          want.push_back(nearest_e4m3(rope[d] / static_cast<float>(s)) * s);
        return want;
      },
      1e-6);
}

TEST(StudyAppend, StaticScaleSaturates) {
  StoreRule rule;
  rule.scale = StoreScale::kStatic;
  rule.static_scale = 1.0f / 128;  // 448 codes reach to 3.5: many values are beyond
  rule.rope_e4m3 = true;
  expect_rule(
      rule, KvCacheFormat::kFp8,
      [](const float* latent, const float* rope) {
        std::vector<double> want;
        for (int d = 0; d < 512; ++d) want.push_back(nearest_e4m3(latent[d] * 128.0) / 128);
        for (int d = 0; d < 64; ++d) want.push_back(nearest_e4m3(rope[d] * 128.0) / 128);
        return want;
      },
      1e-6);
}

TEST(StudyAppend, TilesHaveScalesOfTheirOwnAndRopeIsBf16) {
  StoreRule rule;
  rule.scale = StoreScale::kTile;
  expect_rule(
      rule, KvCacheFormat::kF32,
      [](const float* latent, const float* rope) {
        std::vector<double> want;
        for (int tile = 0; tile < 4; ++tile) {
          const float s = static_cast<float>(amax(latent + 128 * tile, 128)) / 448.0f;
          for (int d = 0; d < 128; ++d)
            want.push_back(nearest_e4m3(latent[128 * tile + d] / s) * static_cast<double>(s));
        }
        for (int d = 0; d < 64; ++d)
          want.push_back(numeric::bf16_to_float(numeric::bf16_from_float(rope[d])));
        return want;
      },
      1e-5);
}

TEST(StudyAppend, NoiseIsOfTheSizeItSays) {
  const auto ops = cpu_ops();
  StudyProblem p({}, 5, *ops);
  StoreRule rule;
  const std::vector<float> plain = fetch(p, *ops, p.fill(KvCacheFormat::kF32, &rule));
  rule.noise = 0.03f;
  const std::vector<float> noisy = fetch(p, *ops, p.fill(KvCacheFormat::kF32, &rule));
  double up = 0, count = 0;
  for (std::size_t i = 0; i < plain.size(); ++i) {
    if (i % 576 >= 512 || plain[i] == 0) {
      EXPECT_EQ(noisy[i], plain[i]);
      continue;
    }
    EXPECT_NEAR(std::fabs(noisy[i] / plain[i] - 1), 0.03, 1e-5);
    up += noisy[i] / plain[i] > 1 ? 1 : 0;
    ++count;
  }
  EXPECT_NEAR(up / count, 0.5, 0.02) << "not a fair coin";
}

TEST(StudyAppend, FaultsAreWhatTheySay) {
  const auto ops = cpu_ops();
  StudyProblem p({{200}}, 9, *ops);
  StoreRule rule;
  const KvCacheView good = p.fill(KvCacheFormat::kFp8, &rule);
  const auto scale = [&](const KvCacheView& c, int t) { return c.scale_plane(t / 64)[t % 64]; };
  const auto with = [&](StoreFault fault, int every) {
    rule.fault = fault;
    rule.fault_every = every;
    return p.fill(KvCacheFormat::kFp8, &rule);
  };
  const KvCacheView swapped = with(StoreFault::kNeighbour, 1);
  const KvCacheView rarely = with(StoreFault::kNeighbour, 32);
  const KvCacheView doubled = with(StoreFault::kBinade, 1);
  const KvCacheView one = with(StoreFault::kBinade, 64);
  const KvCacheView unscaled = with(StoreFault::kRopeUnscaled, 1);
  for (int t = 0; t < 200; ++t) {
    EXPECT_EQ(scale(swapped, t), scale(good, t ^ 1)) << t;
    EXPECT_EQ(scale(rarely, t), scale(good, t % 64 >= 62 ? t ^ 1 : t)) << t;
    EXPECT_EQ(scale(doubled, t), 2 * scale(good, t)) << t;
    EXPECT_EQ(scale(one, t), (t % 64 == 63 ? 2 : 1) * scale(good, t)) << t;
  }
  const std::vector<float> want = fetch(p, *ops, good), got = fetch(p, *ops, unscaled);
  for (std::size_t t = 0; t < 200; ++t) {
    EXPECT_EQ(got[t * 576 + 5], want[t * 576 + 5]);
    const float s = scale(good, static_cast<int>(t));
    EXPECT_NEAR(got[t * 576 + 520] / want[t * 576 + 520], s, 0.01 * s);
  }
}

TEST(StudyDecode, TheSchemesSettingsGiveWhatDecodeGives) {
  const auto ops = cpu_ops();
  for (const int p_block : {64, 128}) {
    for (const int splits : {0, 1, 3}) {
      StudyProblem p({{700, 130, 3}, 3, 5}, 11, *ops);
      const StoreRule rule;
      MlaDecodeArgs real = p.decode_args(p.fill(KvCacheFormat::kFp8, nullptr));
      real.numerics.p_block = p_block;
      real.num_splits = splits;
      ops->mla_decode(real);
      ops::StudyDecodeArgs study{p.decode_args(p.fill(KvCacheFormat::kF32, &rule)), {}};
      study.numerics.p_block = p_block;
      study.decode.num_splits = splits;
      ops->study_decode(study);
      EXPECT_LT(relative(p.out(study.decode), p.out(real)), 1e-5) << p_block << " " << splits;
      study.numerics.p_block = 192 - p_block;
      ops->study_decode(study);
      EXPECT_GT(relative(p.out(study.decode), p.out(real)), 1e-3) << "p_block has no effect";
    }
  }
}

// The 14-bit sums against the reference's scalar model of them.
TEST(StudyDecode, TensorCoreSumsAreTheModels) {
  const auto ops = cpu_ops(), ref = ref::make_ref_backend();
  for (const bool two_level : {true, false}) {
    StudyProblem p({{700, 64, 5}, 1, 2}, 13, *ops), q({{700, 64, 5}, 1, 2}, 13, *ref);
    const StoreRule rule;
    MlaDecodeArgs real = q.decode_args(q.fill(KvCacheFormat::kFp8, nullptr));
    real.numerics = {128, two_level, true};
    real.num_splits = 1;
    ref->mla_decode(real);
    ops::StudyDecodeArgs study{p.decode_args(p.fill(KvCacheFormat::kF32, &rule)), {}};
    study.decode.num_splits = 1;
    study.numerics.accumulation =
        two_level ? Accumulation::kTensorCore : Accumulation::kTensorCoreOneLevel;
    ops->study_decode(study);
    const std::vector<float> cut = p.out(study.decode);
    study.numerics.accumulation = Accumulation::kTwoLevel;
    ops->study_decode(study);
    const double to_model = relative(cut, q.out(real)),
                 to_exact = relative(cut, p.out(study.decode));
    EXPECT_LT(to_model, two_level ? 1e-5 : 5e-5);
    EXPECT_GT(to_exact, 3 * to_model) << "cutting has no effect";
  }
}

// Equal scales and no score: P is 448 throughout, and every cut is the model's. An exponent of the
// product instead of its operands', or a sum that is not cut itself, is 1.6e-5 to 1.9e-5 off.
TEST(StudyDecode, WherePIsConstantEveryCutIsTheModels) {
  const auto ops = cpu_ops(), ref = ref::make_ref_backend();
  quality::StudyShape shape{{700, 64, 5}, 1, 2};
  shape.softmax_scale = 1e-30f;
  StoreRule rule;
  rule.scale = numeric::StoreScale::kStatic;
  rule.static_scale = 0.013f;
  for (const bool two_level : {true, false}) {
    StudyProblem p(shape, 13, *ops), q(shape, 13, *ref);
    MlaDecodeArgs real = q.decode_args(q.fill(KvCacheFormat::kFp8, &rule));
    real.numerics = {128, two_level, true};
    real.num_splits = 1;
    ref->mla_decode(real);
    ops::StudyDecodeArgs study{p.decode_args(p.fill(KvCacheFormat::kF32, &rule)), {}};
    study.decode.num_splits = 1;
    study.numerics.accumulation =
        two_level ? Accumulation::kTensorCore : Accumulation::kTensorCoreOneLevel;
    ops->study_decode(study);
    // In one chain the sum goes through f32 in units of sigma between blocks.
    EXPECT_LT(relative(p.out(study.decode), q.out(real)), two_level ? 1e-6 : 1e-5);
  }
}

TEST(StudyDecode, PAndQueryCanStayUnrounded) {
  const auto ops = cpu_ops();
  StudyProblem p({{500}, 1, 4}, 17, *ops);
  StoreRule exact;
  exact.latent_e4m3 = exact.rope_bf16 = false;
  ops::StudyDecodeArgs study{p.decode_args(p.fill(KvCacheFormat::kF32, &exact)), {}};
  study.numerics.quantise_p = false;
  ops->study_decode(study);
  // The F32 kernel on the same pages: code * scale is what it reads.
  MlaDecodeArgs plain = p.decode_args(study.decode.cache);
  std::vector<float> q_latent, q_rope;
  for (std::int64_t r = 0; r < p.rows(); ++r) {
    const float s = plain.q_scale.data<float>()[r];
    for (int d = 0; d < kKvLoraRank; ++d)
      q_latent.push_back(s *
                         numeric::e4m3_to_float(plain.q_latent.data<Float8E4M3>()[r * 512 + d]));
    for (int d = 0; d < kQkRopeHeadDim; ++d)
      q_rope.push_back(s * numeric::bf16_to_float(plain.q_rope.data<BFloat16>()[r * 64 + d]));
  }
  plain.q_latent = TensorView::of(q_latent.data(), {1, 1, 4, 512});
  plain.q_rope = TensorView::of(q_rope.data(), {1, 1, 4, 64});
  plain.q_scale = {};
  plain.cache.scale = nullptr;
  ops->mla_decode(plain);
  EXPECT_LT(relative(p.out(study.decode), p.out(plain)), 1e-5);
  // The same query, not quantised on the way in.
  study.decode.q_latent = plain.q_latent;
  study.decode.q_rope = plain.q_rope;
  study.decode.q_scale = {};
  ops->study_decode(study);
  EXPECT_LT(relative(p.out(study.decode), p.out(plain)), 1e-5);
  study.numerics.quantise_p = true;
  ops->study_decode(study);
  EXPECT_GT(relative(p.out(study.decode), p.out(plain)), 1e-3) << "P is rounded";
}

}  // namespace
}  // namespace snapmla::quality
