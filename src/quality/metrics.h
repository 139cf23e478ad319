// What logits say about each other.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/thread_pool.h"

namespace snapmla::quality {

struct RowScore {
  double nll = 0;    // -log p(target), nats
  double kl = 0;     // sum_v p_ref(v) (log p_ref(v) - log p(v)) over the whole vocabulary, nats
  bool same = true;  // same argmax (ties to the lowest index)
};

// One row of logits [vocab] against the reference's. The same pointer for both gives kl 0. A row
// with a NaN scores 1e6 for both.
RowScore score_row(std::span<const float> reference, std::span<const float> logits,
                   std::int32_t target);

// Rows of [rows, vocab]; targets [rows], -1: the row is not scored.
std::vector<RowScore> score_rows(ThreadPool& pool, const std::vector<float>& reference,
                                 const std::vector<float>& logits, std::int64_t vocab,
                                 std::span<const std::int32_t> targets);

}  // namespace snapmla::quality
