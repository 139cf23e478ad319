// A checkpoint run step by step through model::Forward, for the logits that Engine keeps to itself:
// those of the absorbed decode path.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "engine/backend_factory.h"
#include "kv_cache/paged_cache.h"
#include "model/config.h"
#include "model/forward.h"
#include "model/weights.h"

namespace snapmla::oracle {

class StepModel {
 public:
  StepModel(const std::filesystem::path& dir, KvCacheFormat format, const std::string& backend,
            DecodeNumerics numerics = {}, ScaleMode scale_mode = ScaleMode::kAmax)
      : config_(model::load_config(dir)),
        ops_(engine::make_backend(backend, 2)),
        checkpoint_(model::Checkpoint::open(dir)),
        weights_(model::load_weights(checkpoint_, config_)),
        cache_(format, config_.num_hidden_layers, 16, ops_->memory()),
        forward_(config_, weights_, *ops_, cache_, 1024, scale_mode, numerics) {
    model::place_weights(weights_, ops_->memory());
  }

  // Logits of every position: the first `prompt` tokens by prefill, the others by decode steps of
  // seqlen_q tokens (the last step may be shorter).
  std::vector<float> logits(const std::vector<std::int32_t>& tokens, std::size_t prompt,
                            std::size_t seqlen_q = 1) {
    SequencePages pages(cache_);
    std::vector<float> all, part;
    const std::span<const std::int32_t> ids(tokens);
    const auto take = [&](const TensorView& hidden) {
      forward_.logits(hidden, part);
      all.insert(all.end(), part.begin(), part.end());
    };
    EXPECT_TRUE(pages.extend(static_cast<std::int64_t>(prompt)));
    take(forward_.prefill(pages, 0, ids.first(prompt)));
    for (std::size_t at = prompt; at < ids.size();) {
      const std::size_t n = std::min(seqlen_q, ids.size() - at);
      EXPECT_TRUE(pages.extend(static_cast<std::int64_t>(n)));
      const SequencePages* sequence = &pages;
      take(forward_.decode({&sequence, 1}, static_cast<int>(n), ids.subspan(at, n)));
      at += n;
    }
    return all;
  }

 private:
  ModelConfig config_;
  std::unique_ptr<ops::OpSet> ops_;
  model::Checkpoint checkpoint_;
  model::ModelWeights weights_;
  PagedCache cache_;
  model::Forward forward_;
};

}  // namespace snapmla::oracle
