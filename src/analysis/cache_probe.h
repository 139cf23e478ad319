// A text run through a checkpoint, with the cache rows of every layer as they are before any FP8
// quantisation, and a sample of the queries that read them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "analysis/layer_analysis.h"
#include "snapmla/kv_cache.h"
#include "snapmla/model_config.h"

namespace snapmla::analysis {

struct CacheProbeOptions {
  std::string model_dir;
  std::string backend = "auto";              // as EngineOptions
  KvCacheFormat rows = KvCacheFormat::kF32;  // or kBf16: the model runs on this cache
  int threads = 0;
  std::int64_t query_positions = 32, heads = 8;  // the sample, evenly spaced; at most these
  std::int64_t value_tokens = 256;
  std::function<void(std::int64_t done, std::int64_t total)> on_load_progress;  // bytes
  std::function<void(std::int64_t done, std::int64_t total)> on_progress;       // tokens
};

// `n` positions (fewer where there are fewer) in [0, total), evenly spaced, the last one included.
std::vector<std::int64_t> evenly_spaced(std::int64_t n, std::int64_t total);

// Memory: the weights, the cache of the text in the given format, and the sample.
class CacheProbe {
 public:
  // Runs `tokens` through the model. Throws what Engine throws, kInvalidArgument for no tokens,
  // tokens outside the vocabulary, more than max_position_embeddings of them, or an FP8 cache.
  CacheProbe(const CacheProbeOptions& options, std::span<const std::int32_t> tokens);
  ~CacheProbe();

  const ModelConfig& config() const;
  std::string backend_name() const;
  std::int64_t tokens() const;
  std::int64_t sampled_positions() const;
  std::int64_t sampled_heads() const;

  // `layer` in [0, num_hidden_layers). The probe must outlive the source.
  LayerSource layer(std::int64_t layer) const;
  // What rounding with feedback should leave of the layer's error (LatentFeedback::left).
  double feedback_left(std::int64_t layer) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace snapmla::analysis
