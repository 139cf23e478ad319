// What KvRounding::kFeedback needs to know of a checkpoint: per layer, how kv_b_proj reads latents.
#pragma once

#include <cstdint>
#include <vector>

#include "model/weights.h"
#include "ops/rounding.h"
#include "snapmla/model_config.h"
#include "tensor/memory.h"

namespace snapmla::model {

class KvFeedback {
 public:
  // 1 MiB and, with 32768 rows of kv_b_proj as DeepSeek-V3 has, 4e9 multiplications per layer, on
  // `threads` threads (0: all there are). Weights lie in `memory`. Throws kInvalidFile, naming the
  // layer, for weights that are not finite.
  KvFeedback(const ModelConfig& config, const ModelWeights& weights, Memory& memory, int threads);

  // In `memory`.
  FeedbackView layer(std::int64_t i) const;
  // LatentFeedback::left.
  double left(std::int64_t i) const { return layers_[static_cast<std::size_t>(i)].left; }

 private:
  std::vector<LatentFeedback> layers_;
  std::vector<Buffer> device_;  // order and matrix per layer, where the host's are out of reach
};

}  // namespace snapmla::model
