// Rounding with feedback: what it must not change, and that it does what it is for.
#include "ops/rounding.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "backends/ref/ref_backend.h"
#include "numeric/scale.h"
#include "ops/ops.h"
#include "snapmla/error.h"

namespace snapmla::ops {
namespace {

constexpr int kN = kKvLoraRank;

// Rows of W with some directions that count more than others.
std::vector<float> weights(int rows, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> w(static_cast<std::size_t>(rows * kN)), mix(static_cast<std::size_t>(8 * kN));
  for (float& x : mix) x = normal(random);
  for (int r = 0; r < rows; ++r) {
    for (int d = 0; d < kN; ++d) {
      w[static_cast<std::size_t>(r * kN + d)] = normal(random) * (d < 64 ? 0.1f : 1.0f) +
                                                3 * mix[static_cast<std::size_t>(r % 8 * kN + d)];
    }
  }
  return w;
}

std::vector<double> gram_of(const std::vector<float>& w) {
  std::vector<double> gram(static_cast<std::size_t>(kN) * kN);
  for (std::size_t r = 0; r < w.size(); r += kN)
    for (int i = 0; i < kN; ++i)
      for (int j = i; j < kN; ++j)
        gram[static_cast<std::size_t>(i * kN + j)] +=
            double{w[r + static_cast<std::size_t>(i)]} * w[r + static_cast<std::size_t>(j)];
  return gram;
}

struct Rows {
  std::vector<float> latent, rope;
  explicit Rows(int n, std::uint32_t seed)
      : latent(static_cast<std::size_t>(n * kN)), rope(static_cast<std::size_t>(n * 64)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (float& x : latent) x = normal(random);
    for (float& x : rope) x = normal(random);
  }
  RoundLatentsArgs args(const LatentFeedback& f, ScaleMode mode = ScaleMode::kAmax) {
    const auto n = static_cast<std::int64_t>(rope.size() / 64);
    return {TensorView::of(latent.data(), {n, kN}), TensorView::of(rope.data(), {n, 64}), f.view(),
            mode};
  }
};

float amax(const float* x) {
  float m = 0;
  for (int d = 0; d < kN; ++d) m = std::max(m, std::fabs(x[d]));
  return m;
}

// |W (y - x)|^2 over all rows of W.
double cost(const std::vector<float>& w, const float* x, const float* y) {
  double sum = 0;
  for (std::size_t r = 0; r < w.size(); r += kN) {
    double dot = 0;
    for (int d = 0; d < kN; ++d) dot += w[r + static_cast<std::size_t>(d)] * (double{y[d]} - x[d]);
    sum += dot * dot;
  }
  return sum;
}

TEST(RoundLatents, ResultsAreCodesOfTheSameScale) {
  auto gram = gram_of(weights(256, 1));
  const LatentFeedback f = make_latent_feedback(gram, "test");
  for (const ScaleMode mode : {ScaleMode::kAmax, ScaleMode::kPow2}) {
    Rows rows(20, 2);
    const std::vector<float> before = rows.latent;
    round_latents(*ref::make_ref_backend(), rows.args(f, mode));
    for (int t = 0; t < 20; ++t) {
      const float* was = &before[static_cast<std::size_t>(t * kN)];
      const float* is = &rows.latent[static_cast<std::size_t>(t * kN)];
      const float scale = numeric::token_scale(amax(was), 0, true, mode);
      if (mode == ScaleMode::kAmax) {
        EXPECT_EQ(numeric::token_scale(amax(is), 0, true, mode), scale);
      }
      for (int d = 0; d < kN; ++d) {
        const float code = numeric::e4m3_to_float(numeric::quantize_latent(is[d], scale));
        EXPECT_EQ(code * scale, is[d]) << t << " " << d;
      }
    }
  }
}

// What the cache holds afterwards are the rounded values, whichever way the scale is chosen.
TEST(RoundLatents, AppendStoresTheValues) {
  auto gram = gram_of(weights(256, 13));
  const LatentFeedback f = make_latent_feedback(gram, "test");
  const auto ref = ref::make_ref_backend();
  for (const ScaleMode mode : {ScaleMode::kAmax, ScaleMode::kPow2}) {
    Rows rows(64, 14);
    const RoundLatentsArgs a = rows.args(f, mode);
    round_latents(*ref, a);
    std::vector<std::uint8_t> page(
        static_cast<std::size_t>(page_layout(KvCacheFormat::kFp8).page_bytes));
    const auto cache = KvCacheView::of_pool(page.data(), 1, KvCacheFormat::kFp8);
    std::vector<std::int64_t> slots(64);
    for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int64_t>(i);
    append_kv(*ref, {a.latent, a.rope, TensorView::of(slots.data(), {64}), cache, mode});
    const std::int32_t table = 0;
    std::vector<float> latent(64 * kN), rope(64 * 64);
    fetch_dequant(
        *ref, {cache, TensorView::of(&table, {1}), 0, 64, TensorView::of(latent.data(), {64, kN}),
               TensorView::of(rope.data(), {64, 64})});
    EXPECT_EQ(latent, rows.latent);
  }
}

TEST(RoundLatents, KeepsWhatTheWeightsSee) {
  const std::vector<float> w = weights(256, 3);
  auto gram = gram_of(w);
  const LatentFeedback f = make_latent_feedback(gram, "test");
  Rows rows(30, 4);
  const std::vector<float> before = rows.latent;
  round_latents(*ref::make_ref_backend(), rows.args(f));
  double nearest = 0, feedback = 0, plain_error = 0, error = 0;
  for (int t = 0; t < 30; ++t) {
    const float* was = &before[static_cast<std::size_t>(t * kN)];
    const float* is = &rows.latent[static_cast<std::size_t>(t * kN)];
    const float scale = numeric::token_scale(amax(was), 0, true, ScaleMode::kAmax);
    std::vector<float> plain(kN);
    for (int d = 0; d < kN; ++d) {
      plain[static_cast<std::size_t>(d)] =
          numeric::e4m3_to_float(numeric::quantize_latent(was[d], scale)) * scale;
      plain_error += std::pow(plain[static_cast<std::size_t>(d)] - was[d], 2);
      error += std::pow(is[d] - was[d], 2);
    }
    nearest += cost(w, was, plain.data());
    feedback += cost(w, was, is);
  }
  EXPECT_LT(feedback, 0.2 * nearest);
  EXPECT_LT(f.left, 0.2);
  EXPECT_LT(error, 4 * plain_error);  // elements themselves move further
  EXPECT_GT(error, plain_error);
}

// Orthogonal weights: nothing to feed back.
TEST(RoundLatents, WithoutCorrelationItIsNearest) {
  std::vector<double> gram(static_cast<std::size_t>(kN) * kN);
  for (int d = 0; d < kN; ++d) gram[static_cast<std::size_t>(d * kN + d)] = 1 + d % 5;
  const LatentFeedback f = make_latent_feedback(gram, "test");
  EXPECT_NEAR(f.left, 1, 1e-9);
  Rows rows(5, 6);
  const std::vector<float> before = rows.latent;
  round_latents(*ref::make_ref_backend(), rows.args(f));
  for (std::size_t i = 0; i < before.size(); ++i) {
    const float scale = numeric::token_scale(amax(&before[i / kN * kN]), 0, true, ScaleMode::kAmax);
    EXPECT_EQ(rows.latent[i],
              numeric::e4m3_to_float(numeric::quantize_latent(before[i], scale)) * scale);
  }
}

TEST(RoundLatents, BackendsAndBatchesAgreeBitForBit) {
  auto gram = gram_of(weights(300, 7));
  const LatentFeedback f = make_latent_feedback(gram, "test");
  Rows all(37, 8), one = all;
  round_latents(*cpu::make_cpu_backend(2), all.args(f));
  const auto ref = ref::make_ref_backend();
  for (int t = 0; t < 37; ++t) {
    RoundLatentsArgs a = one.args(f);
    a.latent = TensorView::of(&one.latent[static_cast<std::size_t>(t * kN)], {1, kN});
    a.rope = TensorView::of(&one.rope[static_cast<std::size_t>(t * 64)], {1, 64});
    round_latents(*ref, a);
  }
  EXPECT_EQ(std::memcmp(all.latent.data(), one.latent.data(), all.latent.size() * 4), 0);
}

TEST(RoundLatents, LeavesRowsAloneThatHaveNoScaleOfTheirOwn) {
  auto gram = gram_of(weights(100, 9));
  const LatentFeedback f = make_latent_feedback(gram, "test");
  Rows rows(3, 10);
  rows.latent[5] = std::numeric_limits<float>::quiet_NaN();
  rows.rope[64 + 3] = std::numeric_limits<float>::infinity();
  std::fill(rows.latent.begin() + 2 * kN, rows.latent.end(), 0.0f);
  const std::vector<float> before = rows.latent;
  round_latents(*ref::make_ref_backend(), rows.args(f));
  EXPECT_EQ(std::memcmp(rows.latent.data(), before.data(), before.size() * 4), 0);
}

// What an engine author calls: the same from the rows themselves.
TEST(RoundLatents, MatricesFromRowsAreTheSame) {
  const std::vector<float> w = weights(128, 21);
  auto gram = gram_of(w);
  const LatentFeedback f = make_latent_feedback(gram, "test");
  const LatentFeedback from_rows = snapmla::make_latent_feedback(w);
  EXPECT_EQ(f.order, from_rows.order);
  EXPECT_EQ(f.matrix, from_rows.matrix);
  EXPECT_EQ(f.left, from_rows.left);
  Rows rows(9, 22), same = rows;
  round_latents(*ref::make_ref_backend(), rows.args(f));
  round_latents(*cpu::make_cpu_backend(2), same.args(from_rows));
  EXPECT_EQ(rows.latent, same.latent);
  const auto expect_refused = [](std::span<const float> bad, const char* message) {
    try {
      snapmla::make_latent_feedback(bad);
      ADD_FAILURE() << "accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
      EXPECT_STREQ(e.what(), message);
    }
  };
  expect_refused({}, "rows: got 0 numbers, accepted are rows of 512");
  expect_refused(std::span(w).first(513), "rows: got 513 numbers, accepted are rows of 512");
  std::vector<float> bad = w;
  bad[1000] = std::nanf("");
  expect_refused(bad, "rows: got weights that are not finite, accepted are finite ones");
}

TEST(RoundLatents, RefusesWhatItCannotUse) {
  for (const double bad : {std::nan(""), HUGE_VAL}) {
    for (const int at : {0, 77 * kN + 77, 5 * kN + 300}) {
      auto gram = gram_of(weights(100, 12));
      gram[static_cast<std::size_t>(at)] = bad;
      EXPECT_THROW(make_latent_feedback(gram, "kv_b_proj of layer 3"), Error) << at;
    }
  }
  Rows rows(2, 11);
  const auto ref = ref::make_ref_backend();
  std::vector<double> zero(static_cast<std::size_t>(kN) * kN);
  const LatentFeedback f = make_latent_feedback(zero, "test");  // nothing reads the latent
  RoundLatentsArgs a = rows.args(f);
  a.rope = TensorView::of(rows.rope.data(), {1, 64});
  EXPECT_THROW(round_latents(*ref, a), Error);
  a = rows.args(f);
  a.feedback = {};
  EXPECT_THROW(round_latents(*ref, a), Error);
  a.feedback = f.view();
  a.feedback.matrix = TensorView::of(f.matrix.data(), {kN / 2, kN});
  EXPECT_THROW(round_latents(*ref, a), Error);
  a.feedback.matrix = TensorView::of(f.matrix.data(), {kN, kN}).with_stride(0, kN + 1);
  EXPECT_THROW(round_latents(*ref, a), Error);
  a.feedback = f.view();
  a.feedback.order = TensorView::of(f.order.data(), {kN - 1});
  EXPECT_THROW(round_latents(*ref, a), Error);
  for (const std::int32_t bad : {-1, kN, f.order[1]}) {  // outside, or twice
    auto order = f.order;
    order[0] = bad;
    a.feedback.order = TensorView::of(order.data(), {kN});
    EXPECT_THROW(round_latents(*ref, a), Error) << bad;
  }
  a = rows.args(f);
  a.rope = TensorView::of(rows.latent.data() + 600, {2, 64});  // inside latent
  EXPECT_THROW(round_latents(*ref, a), Error);
  round_latents(*ref, rows.args(f));
}

}  // namespace
}  // namespace snapmla::ops
