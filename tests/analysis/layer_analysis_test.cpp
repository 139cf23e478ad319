// A layer's report against the same numbers computed directly, in double, with everything kept.
#include "analysis/layer_analysis.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>

#include "analysis/plain.h"
#include "engine/backend_factory.h"
#include "snapmla/error.h"

namespace snapmla::analysis {
namespace {

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

struct Fixture {
  plain::Text text = plain::text(150, 3);
  LayerSource source;
  Fixture() {
    std::mt19937 random(4);
    std::normal_distribution<float> normal;
    source.tokens = text.tokens;
    source.rows = [this](std::int64_t begin, std::int64_t end, float* latent, float* rope) {
      std::copy_n(text.latent.data() + begin * 512, (end - begin) * 512, latent);
      std::copy_n(text.rope.data() + begin * 64, (end - begin) * 64, rope);
    };
    source.query_positions = {0, 63, 64, 100, 149};
    for (int i = 0; i < 5 * 512; ++i) source.query_latent.push_back(normal(random) / 20);
    for (int i = 0; i < 5 * 64; ++i) source.query_rope.push_back(normal(random) / 20);
    source.softmax_scale = 0.125f;
    for (int i = 0; i < 3 * 512; ++i) source.value_weight.push_back(normal(random));
    source.value_positions = {0, 70, 149};
  }
  LayerResult run(int threads = 2) const {
    const auto host = engine::make_backend("cpu", threads);
    ThreadPool pool(threads);
    return analyse_layer(source, *host, pool);
  }
  // Errors of one part's scores, [queries][keys], and the scores themselves.
  using Scores = std::vector<std::vector<double>>;
  Scores scores(bool latent, const Scheme* scheme) const {
    const int width = latent ? 512 : 64;
    std::vector<double> rows;
    for (std::int64_t t = 0; t < text.tokens; ++t) {
      for (int c = 0; c < width; ++c) {
        const double x = latent ? text.l(t, c) : text.r(t, c);
        rows.push_back(scheme ? plain::stored(text, *scheme, latent, t, c) - x : x);
      }
    }
    const std::vector<float>& q = latent ? source.query_latent : source.query_rope;
    Scores all;
    for (std::size_t i = 0; i < source.query_positions.size(); ++i) {
      std::vector<double>& one = all.emplace_back();
      for (std::int64_t j = 0; j <= source.query_positions[i]; ++j) {
        one.push_back(source.softmax_scale * std::inner_product(&q[i * sz(width)],
                                                                &q[i * sz(width)] + width,
                                                                &rows[sz(j * width)], 0.0));
      }
    }
    return all;
  }
};

std::vector<double> softmax(const std::vector<double>& s) {
  const double top = *std::ranges::max_element(s);
  double sum = 0;
  for (double v : s) sum += std::exp(v - top);
  std::vector<double> p;
  for (double v : s) p.push_back(std::exp(v - top) / sum);
  return p;
}

void expect_scores(const ScoreError& got, const Fixture::Scores& exact,
                   const Fixture::Scores& error, const std::string& name) {
  double squares = 0, largest = 0, kl_sum = 0, kl_largest = 0, keys = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    std::vector<double> changed;
    for (std::size_t j = 0; j < exact[i].size(); ++j) {
      changed.push_back(exact[i][j] + error[i][j]);
      squares += error[i][j] * error[i][j];
      largest = std::max(largest, std::fabs(error[i][j]));
      keys += 1;
    }
    const std::vector<double> p = softmax(exact[i]), q = softmax(changed);
    double kl = 0;
    for (std::size_t j = 0; j < p.size(); ++j) kl += p[j] * std::log(p[j] / q[j]);
    kl_sum += kl;
    kl_largest = std::max(kl_largest, kl);
  }
  const double n = static_cast<double>(exact.size());
  EXPECT_NEAR(got.rms / std::sqrt(squares / keys), 1, 1e-4) << name;
  EXPECT_NEAR(got.largest / largest, 1, 1e-4) << name;
  EXPECT_NEAR(got.kl_mean, kl_sum / n, 1e-3 * kl_sum / n) << name;
  EXPECT_NEAR(got.kl_largest, kl_largest, 1e-3 * kl_largest) << name;
}

Fixture::Scores sum(Fixture::Scores a, const Fixture::Scores& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    for (std::size_t j = 0; j < a[i].size(); ++j) a[i][j] += b[i][j];
  return a;
}

TEST(LayerAnalysis, ErrorsOfTheRows) {
  const Fixture f;
  const LayerResult r = f.run();
  const auto check = [&](bool latent, Scheme scheme, const PartError& got) {
    double error = 0, norm = 0, largest = 0;
    for (std::int64_t t = 0; t < f.text.tokens; ++t) {
      for (int c = 0; c < (latent ? 512 : 64); ++c) {
        const double x = latent ? f.text.l(t, c) : f.text.r(t, c);
        const double e = plain::stored(f.text, scheme, latent, t, c) - x;
        error += e * e;
        norm += x * x;
        largest = std::max(largest, std::fabs(e));
      }
    }
    EXPECT_NEAR(got.relative_l2 / std::sqrt(error / norm), 1, 1e-5) << name_of(scheme);
    EXPECT_NEAR(got.largest / largest, 1, 1e-5) << name_of(scheme);
  };
  for (std::size_t i = 0; i < kLatentSchemes.size(); ++i)
    check(true, kLatentSchemes[i], r.latent_errors.at(i));
  for (std::size_t i = 0; i < kRopeSchemes.size(); ++i)
    check(false, kRopeSchemes[i], r.rope_errors.at(i));
  EXPECT_EQ(r.latent.count(), 150 * 512);
  EXPECT_EQ(r.rope.largest(), plain::amax(f.text, false, 0, 150, 0, 64));
}

TEST(LayerAnalysis, ErrorsOfScoresAndProbabilities) {
  const Fixture f;
  const LayerResult r = f.run();
  const Fixture::Scores exact = sum(f.scores(true, nullptr), f.scores(false, nullptr));
  std::map<Scheme, Fixture::Scores> latent, rope;
  for (std::size_t i = 0; i < kLatentSchemes.size(); ++i) {
    const Scheme s = kLatentSchemes[i];
    latent[s] = f.scores(true, &s);
    expect_scores(r.latent_errors.at(i).score, exact, latent[s],
                  std::string("latent ") + name_of(s));
  }
  for (std::size_t i = 0; i < kRopeSchemes.size(); ++i) {
    const Scheme s = kRopeSchemes[i];
    rope[s] = f.scores(false, &s);
    expect_scores(r.rope_errors.at(i).score, exact, rope[s], std::string("rope ") + name_of(s));
  }
  for (std::size_t i = 0; i < kLayouts.size(); ++i) {
    const Layout& l = kLayouts[i];
    expect_scores(r.layouts.at(i), exact, sum(latent.at(l.latent), rope.at(l.rope)), l.name);
  }
}

TEST(LayerAnalysis, SpreadOfTheScores) {
  const Fixture f;
  const LayerResult r = f.run();
  const auto spread = [](const Fixture::Scores& all) {
    double mean_deviation = 0;
    for (const std::vector<double>& s : all) {
      const double n = static_cast<double>(s.size());
      const double mean = std::accumulate(s.begin(), s.end(), 0.0) / n;
      double squares = 0;
      for (double v : s) squares += (v - mean) * (v - mean);
      mean_deviation += std::sqrt(squares / n) / static_cast<double>(all.size());
    }
    return mean_deviation;
  };
  const Fixture::Scores latent = f.scores(true, nullptr), rope = f.scores(false, nullptr);
  EXPECT_NEAR(r.score_std_latent / spread(latent), 1, 1e-5);
  EXPECT_NEAR(r.score_std_rope / spread(rope), 1, 1e-5);
  EXPECT_NEAR(r.score_std / spread(sum(latent, rope)), 1, 1e-5);
}

TEST(LayerAnalysis, ErrorsOfTheValues) {
  const Fixture f;
  const LayerResult r = f.run();
  for (std::size_t i = 0; i < kLatentSchemes.size(); ++i) {
    double error = 0, norm = 0;
    for (std::int64_t t : f.source.value_positions) {
      for (std::size_t o = 0; o < 3; ++o) {
        double e = 0, v = 0;
        for (int c = 0; c < 512; ++c) {
          const double w = f.source.value_weight[o * 512 + sz(c)], x = f.text.l(t, c);
          e += w * (plain::stored(f.text, kLatentSchemes[i], true, t, c) - x);
          v += w * x;
        }
        error += e * e;
        norm += v * v;
      }
    }
    EXPECT_NEAR(r.latent_errors[i].value_relative_l2 / std::sqrt(error / norm), 1, 1e-4)
        << name_of(kLatentSchemes[i]);
  }
}

TEST(LayerAnalysis, ThreadsChangeNothing) {
  const Fixture f;
  const LayerResult one = f.run(1), three = f.run(3);
  for (std::size_t i = 0; i < one.latent_errors.size(); ++i) {
    EXPECT_EQ(one.latent_errors[i].relative_l2, three.latent_errors[i].relative_l2);
    EXPECT_EQ(one.latent_errors[i].score.kl_mean, three.latent_errors[i].score.kl_mean);
    EXPECT_EQ(one.latent_errors[i].value_relative_l2, three.latent_errors[i].value_relative_l2);
  }
  EXPECT_EQ(one.score_std, three.score_std);
}

// Scaling a channel by a power of two and the query and W_UV back changes no score and no value.
TEST(LayerAnalysis, ScoresAndValuesIgnoreAReparametrisation) {
  Fixture f;
  const LayerResult before = f.run();
  for (std::size_t i = 7; i < f.text.latent.size(); i += 512) f.text.latent[i] *= 65536;
  for (std::size_t i = 7; i < f.source.query_latent.size(); i += 512)
    f.source.query_latent[i] /= 65536;
  for (std::size_t i = 7; i < f.source.value_weight.size(); i += 512)
    f.source.value_weight[i] /= 65536;
  const LayerResult after = f.run();
  EXPECT_EQ(after.score_std, before.score_std);
  // bf16 and one scale per channel do not feel it; one scale per token does.
  EXPECT_EQ(after.latent_errors[0].score.rms, before.latent_errors[0].score.rms);
  EXPECT_EQ(after.latent_errors[4].score.kl_mean, before.latent_errors[4].score.kl_mean);
  EXPECT_EQ(after.latent_errors[4].value_relative_l2, before.latent_errors[4].value_relative_l2);
  EXPECT_GT(after.latent_errors[7].score.rms, 2 * before.latent_errors[7].score.rms);
  ASSERT_EQ(kLatentSchemes[4], Scheme::kChannel);
  ASSERT_EQ(kLatentSchemes[7], Scheme::kToken);
}

TEST(LayerAnalysis, RowsThatAreNotFiniteAreCountedAndShow) {
  Fixture f;
  f.text.latent[512 * 80 + 3] = std::nanf("");
  const LayerResult r = f.run();
  EXPECT_EQ(r.latent.non_finite(), 1);
  for (const PartError& e : r.latent_errors) {
    EXPECT_TRUE(std::isnan(e.relative_l2));
    EXPECT_FALSE(is_safe(e, SafetyRule{}));
  }
  EXPECT_TRUE(std::isfinite(r.rope_errors[0].relative_l2));
  EXPECT_TRUE(std::isnan(r.layouts[0].kl_mean));
}

TEST(LayerAnalysis, SafeNeedsBothLimits) {
  PartError e;
  e.relative_l2 = 0.03;
  e.score.kl_mean = 1e-3;
  const SafetyRule rule;
  EXPECT_TRUE(is_safe(e, rule));
  e.relative_l2 = 0.0301;
  EXPECT_FALSE(is_safe(e, rule));
  e.relative_l2 = 0.02;
  e.score.kl_mean = 1.1e-3;
  EXPECT_FALSE(is_safe(e, rule));
}

TEST(LayerAnalysis, SourcesThatDoNotFitAreRefused) {
  const Fixture good;
  for (int fault = 0; fault < 5; ++fault) {
    Fixture f;
    if (fault == 0) f.source.tokens = 0;
    if (fault == 1) f.source.query_positions.back() = 150;
    if (fault == 2) f.source.query_latent.pop_back();
    if (fault == 3) f.source.value_positions = {5, 4};
    if (fault == 4) f.source.value_weight.pop_back();
    EXPECT_THROW(f.run(), Error) << fault;
  }
  EXPECT_NO_THROW(good.run());
}

}  // namespace
}  // namespace snapmla::analysis
