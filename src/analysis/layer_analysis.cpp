#include "analysis/layer_analysis.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <span>

#include "analysis/score_errors.h"
#include "base/check.h"
#include "ops/ops.h"
#include "snapmla/kv_cache.h"

namespace snapmla::analysis {
namespace {

constexpr std::int64_t kLatentCount = std::ssize(kLatentSchemes);
constexpr std::int64_t kRopeCount = std::ssize(kRopeSchemes);
constexpr std::int64_t kLayoutCount = std::ssize(kLayouts);
constexpr std::int64_t kVariants = kLatentCount + kRopeCount + kLayoutCount;

constexpr std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

template <class Schemes>
std::int64_t index_of(const Schemes& schemes, Scheme scheme) {
  return std::ranges::find(schemes, scheme) - schemes.begin();
}

double sum_of_squares(const float* x, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

// One part's rows of a page under every scheme, as errors, and behind them the rows themselves:
// [schemes + 1, count, width].
class ErrorRows {
 public:
  ErrorRows(Part part, std::span<const Scheme> schemes)
      : part_(part),
        schemes_(schemes),
        width_(part == Part::kLatent ? kKvLoraRank : kQkRopeHeadDim),
        values_((schemes.size() + 1) * sz(kPageSize * width_)),
        error_squares_(schemes.size()),
        errors_(schemes.size()) {}

  void take(const Rows& rows, const LayerRange& range, ThreadPool& threads) {
    const std::int64_t n = rows.count * width_;
    const float* x = part_ == Part::kLatent ? rows.latent : rows.rope;
    count_ = rows.count;
    std::copy(x, x + n, values_.data() + n * std::ssize(schemes_));
    squares_ += sum_of_squares(x, n);
    threads.parallel_for(std::ssize(schemes_), [&](std::int64_t i) {
      float* out = values_.data() + i * n;
      const Tally tally = apply(schemes_[sz(i)], part_, rows, range, out);
      PartError& error = errors_[sz(i)];
      error.tally.clipped += tally.clipped;
      error.tally.flushed += tally.flushed;
      for (std::int64_t k = 0; k < n; ++k) {
        out[k] -= x[k];
        const double magnitude = std::fabs(out[k]);
        if (!(magnitude <= error.largest)) error.largest = magnitude;
      }
      error_squares_[sz(i)] += sum_of_squares(out, n);
    });
  }

  // queries x (schemes + 1) x count.
  void scores(ops::OpSet& host, const std::vector<float>& queries, std::vector<float>& out) const {
    const std::int64_t n = std::ssize(queries) / width_, keys = (std::ssize(schemes_) + 1) * count_;
    out.resize(sz(n * keys));
    ops::Weight weight;
    weight.data = TensorView::of(values_.data(), {keys, width_});
    ops::linear(host, {TensorView::of(queries.data(), {n, width_}), weight,
                       TensorView::of(out.data(), {n, keys})});
  }

  const float* row(std::int64_t scheme, std::int64_t token) const {
    return values_.data() + (scheme * count_ + token) * width_;
  }

  std::vector<PartError> finish() {
    for (std::size_t i = 0; i < errors_.size(); ++i) {
      errors_[i].relative_l2 =
          squares_ > 0 ? std::sqrt(error_squares_[i] / squares_) : std::sqrt(error_squares_[i]);
    }
    return errors_;
  }

 private:
  Part part_;
  std::span<const Scheme> schemes_;
  std::int64_t width_, count_ = 0;
  std::vector<float> values_;
  double squares_ = 0;
  std::vector<double> error_squares_;
  std::vector<PartError> errors_;
};

// |W_UV e|^2 of every scheme's error e, and of the latents, over the sampled tokens.
class ValueErrors {
 public:
  void take(const LayerSource& source, std::int64_t begin, const Rows& rows,
            const ErrorRows& latent, ops::OpSet& host) {
    for (; next_ < source.value_positions.size(); ++next_) {
      const std::int64_t token = source.value_positions[next_] - begin;
      if (token >= rows.count) return;
      const std::int64_t outputs = std::ssize(source.value_weight) / kKvLoraRank;
      std::vector<float> x, y(sz((kLatentCount + 1) * outputs));
      for (std::int64_t i = 0; i <= kLatentCount; ++i) {
        x.insert(x.end(), latent.row(i, token), latent.row(i, token) + kKvLoraRank);
      }
      ops::Weight weight;
      weight.data = TensorView::of(source.value_weight.data(), {outputs, kKvLoraRank});
      ops::linear(host, {TensorView::of(x.data(), {kLatentCount + 1, kKvLoraRank}), weight,
                         TensorView::of(y.data(), {kLatentCount + 1, outputs})});
      for (std::int64_t i = 0; i <= kLatentCount; ++i) {
        squares_[sz(i)] += sum_of_squares(y.data() + i * outputs, outputs);
      }
    }
  }
  double relative_l2(std::int64_t scheme) const {
    const double all = squares_[sz(kLatentCount)];
    return all > 0 ? std::sqrt(squares_[sz(scheme)] / all) : 0;
  }

 private:
  std::size_t next_ = 0;
  std::array<double, sz(kLatentCount) + 1> squares_{};
};

struct Query {
  Query() : scores(sz(kVariants)) {}
  QueryScores scores;
  Moments latent, rope, both;
};

// The keys of one page that a query sees.
void add_keys(Query& query, std::int64_t visible, std::int64_t count, double scale,
              const float* latent, const float* rope) {
  std::array<double, sz(kVariants)> errors;
  for (std::int64_t j = 0; j < visible; ++j) {
    const auto of_latent = [&](std::int64_t i) { return scale * latent[i * count + j]; };
    const auto of_rope = [&](std::int64_t i) { return scale * rope[i * count + j]; };
    for (std::int64_t i = 0; i < kLatentCount; ++i) errors[sz(i)] = of_latent(i);
    for (std::int64_t i = 0; i < kRopeCount; ++i) errors[sz(kLatentCount + i)] = of_rope(i);
    for (std::int64_t i = 0; i < kLayoutCount; ++i) {
      const Layout& layout = kLayouts[sz(i)];
      errors[sz(kLatentCount + kRopeCount + i)] =
          of_latent(index_of(kLatentSchemes, layout.latent)) +
          of_rope(index_of(kRopeSchemes, layout.rope));
    }
    const double score = of_latent(kLatentCount) + of_rope(kRopeCount);
    query.latent.add(of_latent(kLatentCount));
    query.rope.add(of_rope(kRopeCount));
    query.both.add(score);
    query.scores.add(score, errors.data());
  }
}

ScoreError score_error(const std::vector<Query>& queries, std::int64_t variant) {
  ScoreError all;
  std::int64_t keys = 0;
  for (const Query& q : queries) {
    const QueryScores::Variant one = q.scores.variant(sz(variant));
    keys += q.scores.keys();
    all.rms += one.squares;
    if (!(one.largest <= all.largest)) all.largest = one.largest;
    all.kl_mean += one.kl;
    if (!(one.kl <= all.kl_largest)) all.kl_largest = one.kl;
  }
  if (keys > 0) all.rms = std::sqrt(all.rms / static_cast<double>(keys));
  if (!queries.empty()) all.kl_mean /= static_cast<double>(queries.size());
  return all;
}

void finish_scores(const std::vector<Query>& queries, LayerResult& result) {
  for (std::int64_t i = 0; i < kLatentCount; ++i) {
    result.latent_errors[sz(i)].score = score_error(queries, i);
  }
  for (std::int64_t i = 0; i < kRopeCount; ++i) {
    result.rope_errors[sz(i)].score = score_error(queries, kLatentCount + i);
  }
  for (std::int64_t i = 0; i < kLayoutCount; ++i) {
    result.layouts.push_back(score_error(queries, kLatentCount + kRopeCount + i));
  }
  for (const Query& q : queries) {
    const auto n = static_cast<double>(queries.size());
    result.score_std_latent += q.latent.standard_deviation() / n;
    result.score_std_rope += q.rope.standard_deviation() / n;
    result.score_std += q.both.standard_deviation() / n;
  }
}

void check(const LayerSource& source) {
  const std::size_t queries = source.query_positions.size();
  const auto inside = [&](std::int64_t p) { return p >= 0 && p < source.tokens; };
  if (source.tokens < 1 || source.query_latent.size() != queries * sz(kKvLoraRank) ||
      source.query_rope.size() != queries * sz(kQkRopeHeadDim) ||
      source.value_weight.size() % sz(kKvLoraRank) != 0 ||
      !std::ranges::all_of(source.query_positions, inside) ||
      !std::ranges::all_of(source.value_positions, inside) ||
      !std::ranges::is_sorted(source.value_positions)) {
    throw Error(ErrorCode::kInvalidArgument,
                "layer source: got sizes or positions that do not belong together, accepted are "
                "at least 1 token, rows of 512 and 64 per query, positions inside the text");
  }
}

}  // namespace

LayerResult::LayerResult() : latent(kKvLoraRank), rope(kQkRopeHeadDim) {}

LayerResult analyse_layer(const LayerSource& source, ops::OpSet& host, ThreadPool& threads) {
  check(source);
  std::vector<float> latent(sz(kPageSize * kKvLoraRank)), rope(sz(kPageSize * kQkRopeHeadDim));
  const auto each_page = [&](const auto& use) {
    for (std::int64_t at = 0; at < source.tokens; at += kPageSize) {
      const std::int64_t n = std::min<std::int64_t>(kPageSize, source.tokens - at);
      source.rows(at, at + n, latent.data(), rope.data());
      use(at, Rows{n, latent.data(), rope.data()});
    }
  };

  LayerResult result;
  each_page([&](std::int64_t, const Rows& rows) {
    result.latent.add(rows.latent, rows.count);
    result.rope.add(rows.rope, rows.count);
  });
  const LayerRange range{result.latent.largest(), result.rope.largest(),
                         result.latent.channel_largest(), result.rope.channel_largest()};

  ErrorRows latent_rows(Part::kLatent, kLatentSchemes), rope_rows(Part::kRope, kRopeSchemes);
  ValueErrors values;
  std::vector<Query> queries(source.query_positions.size());
  std::vector<float> latent_scores, rope_scores;
  each_page([&](std::int64_t begin, const Rows& rows) {
    latent_rows.take(rows, range, threads);
    rope_rows.take(rows, range, threads);
    values.take(source, begin, rows, latent_rows, host);
    if (queries.empty()) return;
    latent_rows.scores(host, source.query_latent, latent_scores);
    rope_rows.scores(host, source.query_rope, rope_scores);
    threads.parallel_for(std::ssize(queries), [&](std::int64_t i) {
      const std::int64_t visible =
          std::clamp<std::int64_t>(source.query_positions[sz(i)] - begin + 1, 0, rows.count);
      add_keys(queries[sz(i)], visible, rows.count, source.softmax_scale,
               latent_scores.data() + i * (kLatentCount + 1) * rows.count,
               rope_scores.data() + i * (kRopeCount + 1) * rows.count);
    });
  });
  result.latent_errors = latent_rows.finish();
  result.rope_errors = rope_rows.finish();
  for (std::int64_t i = 0; i < kLatentCount; ++i) {
    result.latent_errors[sz(i)].value_relative_l2 = values.relative_l2(i);
  }
  finish_scores(queries, result);
  return result;
}

bool is_safe(const PartError& error, const SafetyRule& rule) {
  return error.relative_l2 <= rule.relative_l2 && error.score.kl_mean <= rule.kl_mean;
}

}  // namespace snapmla::analysis
