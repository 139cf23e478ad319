// What a layer's cache rows look like, and what each way of storing them costs.
//
// Two passes over the rows, page by page, in memory that does not grow with the text: the first
// takes ranges and distributions, the second quantises every row under every scheme of
// analysis/schemes.h and follows the errors into
//
//   scores         e_ij = scale * q_i . (k^_j - k_j), for a sample of queries and every key they
//   see probabilities  KL(softmax(s_i) || softmax(s_i + e_i)) per query, in nats values |W_UV (c^_j
//   - c_j)| / |W_UV c_j|, for a sample of tokens (latent part only)
//
// Scores and values do not change when a channel of the cache is rescaled and the weights that read
// it are scaled back, relative errors of the rows do.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "analysis/part_stats.h"
#include "analysis/schemes.h"
#include "base/thread_pool.h"
#include "ops/op_set.h"

namespace snapmla::analysis {

// One layer of a text that went through the model.
struct LayerSource {
  std::int64_t tokens = 0;
  // Rows [begin, end) as the cache was given them, before any quantisation: [n, 512], [n, 64].
  std::function<void(std::int64_t begin, std::int64_t end, float* latent, float* rope)> rows;

  // The sampled queries, absorbed: score_ij = softmax_scale * (latent_i . c_j + rope_i . k_j).
  std::vector<std::int64_t> query_positions;  // [queries]; a query sees tokens 0 to its own
  std::vector<float> query_latent;            // [queries, 512]
  std::vector<float> query_rope;              // [queries, 64]
  float softmax_scale = 0;

  std::vector<float> value_weight;            // [outputs, 512]: W_UV of the sampled heads
  std::vector<std::int64_t> value_positions;  // sampled tokens, rising
};

struct ScoreError {
  double rms = 0, largest = 0;         // of e_ij, in units of the softmax's argument
  double kl_mean = 0, kl_largest = 0;  // over queries, nats
};

struct PartError {
  double relative_l2 = 0;  // of the part's rows, all tokens
  double largest = 0;      // magnitude of the largest element's error
  Tally tally;
  ScoreError score;
  double value_relative_l2 = 0;  // latent part
};

struct LayerResult {
  LayerResult();

  PartStats latent, rope;
  // Standard deviation of the scores over a query's keys, mean over queries: of both terms and of
  // the sum.
  double score_std_latent = 0, score_std_rope = 0, score_std = 0;
  std::vector<PartError> latent_errors;  // as kLatentSchemes
  std::vector<PartError> rope_errors;    // as kRopeSchemes
  std::vector<ScoreError> layouts;       // as kLayouts
};

// `host` computes; its memory must be the host's. The result does not depend on the number of
// threads.
LayerResult analyse_layer(const LayerSource& source, ops::OpSet& host, ThreadPool& threads);

// The rule by which a part counts as safe to quantise under a scheme.
struct SafetyRule {
  double relative_l2 =
      0.03;  // what e4m3's rounding costs within its range (0.022 to 0.027), rounded up
  double kl_mean = 1e-3;  // nats
};
bool is_safe(const PartError& error, const SafetyRule& rule);

}  // namespace snapmla::analysis
