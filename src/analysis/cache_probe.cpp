#include "analysis/cache_probe.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <vector>

#include "base/check.h"
#include "engine/backend_factory.h"
#include "kv_cache/paged_cache.h"
#include "model/config.h"
#include "model/forward.h"
#include "model/kv_feedback.h"
#include "model/safetensors.h"
#include "model/weights.h"
#include "ops/ops.h"

namespace snapmla::analysis {
namespace {

constexpr std::int64_t kChunk = 512;  // prompt tokens per forward; never changes a result

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

std::int64_t float_bytes(std::int64_t n) { return n * static_cast<std::int64_t>(sizeof(float)); }

}  // namespace

std::vector<std::int64_t> evenly_spaced(std::int64_t n, std::int64_t total) {
  n = std::min(n, total);
  std::vector<std::int64_t> all;
  for (std::int64_t i = 1; i <= n; ++i) all.push_back(i * total / n - 1);
  return all;
}

struct CacheProbe::Impl {
  struct Sample {
    std::vector<float> latent, rope;  // [positions * heads, ...]
    std::vector<float> value_weight;  // [heads * v, 512]
  };

  ModelConfig config;
  std::unique_ptr<ops::OpSet> ops;
  model::Checkpoint checkpoint;
  model::ModelWeights weights;
  std::int64_t tokens;
  PagedCache cache;
  model::Forward forward;
  SequencePages pages;
  std::vector<std::int64_t> positions, heads;
  std::vector<Sample> samples;  // [layers]
  std::vector<std::int64_t> value_positions;
  std::vector<double> feedback_left;     // [layers]
  Buffer table, latent, rope, absorbed;  // in the backend's memory

  Impl(const CacheProbeOptions& options, std::span<const std::int32_t> ids);
  void run(const CacheProbeOptions& options, std::span<const std::int32_t> ids);
  void take_values(std::int64_t layer);
  void take_queries(std::int64_t layer, std::span<const std::int32_t> at, const TensorView& q);
  void rows(std::int64_t layer, std::int64_t begin, std::int64_t end, float* latent_out,
            float* rope_out);
};

CacheProbe::Impl::Impl(const CacheProbeOptions& options, std::span<const std::int32_t> ids)
    : config(model::load_config(options.model_dir)),
      ops(engine::make_backend(options.backend, options.threads)),
      checkpoint(model::Checkpoint::open(options.model_dir)),
      weights(model::load_weights(checkpoint, config, options.on_load_progress)),
      tokens(std::ssize(ids)),
      cache(options.rows, config.num_hidden_layers, (tokens + kPageSize - 1) / kPageSize,
            ops->memory()),
      forward(config, weights, *ops, cache, tokens, ScaleMode::kAmax, DecodeNumerics{}),
      pages(cache),
      positions(evenly_spaced(options.query_positions, tokens)),
      heads(evenly_spaced(options.heads, config.num_attention_heads)),
      samples(sz(config.num_hidden_layers)),
      value_positions(evenly_spaced(options.value_tokens, tokens)) {
  for (std::int64_t layer = 0; layer < config.num_hidden_layers; ++layer) take_values(layer);
  model::place_weights(weights, ops->memory());
  feedback_left.assign(sz(config.num_hidden_layers), std::nan(""));
  try {
    const model::KvFeedback feedback(config, weights, ops->memory(), options.threads);
    for (std::int64_t layer = 0; layer < config.num_hidden_layers; ++layer)
      feedback_left[sz(layer)] = feedback.left(layer);
  } catch (const Error& e) {
    if (e.code() != ErrorCode::kInvalidFile) throw;  // weights that are not finite: nothing to say
  }
  run(options, ids);
}

void CacheProbe::Impl::run(const CacheProbeOptions& options, std::span<const std::int32_t> ids) {
  forward.observe_queries([this](std::int64_t layer, std::span<const std::int32_t> at,
                                 const TensorView& q) { take_queries(layer, at, q); });
  pages.extend(tokens);
  for (std::int64_t at = 0; at < tokens;) {
    const std::int64_t n = std::min(kChunk, tokens - at);
    forward.prefill(pages, at, ids.subspan(sz(at), sz(n)));
    checkpoint.check_reads();
    at += n;
    if (options.on_progress) options.on_progress(at, tokens);
  }
  forward.observe_queries({});
  Memory& memory = ops->memory();
  table.grow(memory, static_cast<std::int64_t>(pages.table().size_bytes()));
  memory.upload(table.data(), pages.table().data(),
                static_cast<std::int64_t>(pages.table().size_bytes()));
}

// Before the weights go to a device. w_uv is f32: it is made at load.
void CacheProbe::Impl::take_values(std::int64_t layer) {
  const TensorView& w_uv = weights.layers[sz(layer)].w_uv;
  for (std::int64_t head : heads) {
    const float* from = w_uv.row<float>(head);
    samples[sz(layer)].value_weight.insert(samples[sz(layer)].value_weight.end(), from,
                                           from + config.v_head_dim * kKvLoraRank);
  }
}

void CacheProbe::Impl::take_queries(std::int64_t layer, std::span<const std::int32_t> at,
                                    const TensorView& q) {
  const std::int64_t all_heads = config.num_attention_heads, nope = config.qk_nope_head_dim;
  const std::int64_t width = config.qk_head_dim();
  Memory& memory = ops->memory();
  std::vector<float> host_q(sz(all_heads * width)), host_absorbed(sz(all_heads * kKvLoraRank));
  for (std::size_t i = 0; i < at.size(); ++i) {
    if (!std::ranges::binary_search(positions, std::int64_t{at[i]})) continue;
    float* row = q.row<float>(static_cast<std::int64_t>(i));
    absorbed.grow(memory, float_bytes(all_heads * kKvLoraRank));
    ops::head_linear(
        *ops, {TensorView::of(row, {1, all_heads, nope}).with_stride(1, width),
               weights.layers[sz(layer)].w_uk,
               TensorView::of(static_cast<float*>(absorbed.data()), {1, all_heads, kKvLoraRank})});
    memory.download(host_q.data(), row, float_bytes(all_heads * width));
    memory.download(host_absorbed.data(), absorbed.data(), float_bytes(all_heads * kKvLoraRank));
    Sample& sample = samples[sz(layer)];
    for (std::int64_t head : heads) {
      const float* latent_row = host_absorbed.data() + head * kKvLoraRank;
      const float* rope_row = host_q.data() + head * width + nope;
      sample.latent.insert(sample.latent.end(), latent_row, latent_row + kKvLoraRank);
      sample.rope.insert(sample.rope.end(), rope_row, rope_row + kQkRopeHeadDim);
    }
  }
}

void CacheProbe::Impl::rows(std::int64_t layer, std::int64_t begin, std::int64_t end,
                            float* latent_out, float* rope_out) {
  const std::int64_t n = end - begin;
  Memory& memory = ops->memory();
  latent.grow(memory, float_bytes(n * kKvLoraRank));
  rope.grow(memory, float_bytes(n * kQkRopeHeadDim));
  ops::fetch_dequant(
      *ops, {cache.layer(layer), TensorView(table.data(), DType::kI32, {std::ssize(pages.table())}),
             begin, end, TensorView::of(static_cast<float*>(latent.data()), {n, kKvLoraRank}),
             TensorView::of(static_cast<float*>(rope.data()), {n, kQkRopeHeadDim})});
  memory.download(latent_out, latent.data(), float_bytes(n * kKvLoraRank));
  memory.download(rope_out, rope.data(), float_bytes(n * kQkRopeHeadDim));
}

CacheProbe::CacheProbe(const CacheProbeOptions& options, std::span<const std::int32_t> tokens) {
  require(!tokens.empty(), "tokens", "none", "at least 1");
  require(options.rows != KvCacheFormat::kFp8, "rows", "fp8", "f32 or bf16, before quantisation");
  const ModelConfig config = model::load_config(options.model_dir);
  if (std::ssize(tokens) > config.max_position_embeddings) {
    throw Error(ErrorCode::kInvalidArgument,
                str("tokens: got ", tokens.size(), ", accepted are at most the ",
                    config.max_position_embeddings, " of the model's context"));
  }
  impl_ = std::make_unique<Impl>(options, tokens);
}

CacheProbe::~CacheProbe() = default;

const ModelConfig& CacheProbe::config() const { return impl_->config; }
std::string CacheProbe::backend_name() const { return impl_->ops->name(); }
std::int64_t CacheProbe::tokens() const { return impl_->tokens; }
std::int64_t CacheProbe::sampled_positions() const { return std::ssize(impl_->positions); }
std::int64_t CacheProbe::sampled_heads() const { return std::ssize(impl_->heads); }

double CacheProbe::feedback_left(std::int64_t layer) const {
  return impl_->feedback_left.at(sz(layer));
}

LayerSource CacheProbe::layer(std::int64_t layer) const {
  Impl& p = *impl_;
  require(layer >= 0 && layer < p.config.num_hidden_layers, "layer", layer,
          "0 to num_hidden_layers - 1");
  LayerSource source;
  source.tokens = p.tokens;
  source.rows = [&p, layer](std::int64_t begin, std::int64_t end, float* latent, float* rope) {
    p.rows(layer, begin, end, latent, rope);
  };
  for (std::int64_t position : p.positions) {
    source.query_positions.insert(source.query_positions.end(), p.heads.size(), position);
  }
  source.query_latent = p.samples[sz(layer)].latent;
  source.query_rope = p.samples[sz(layer)].rope;
  source.softmax_scale = static_cast<float>(p.config.softmax_scale());
  source.value_weight = p.samples[sz(layer)].value_weight;
  source.value_positions = p.value_positions;
  return source;
}

}  // namespace snapmla::analysis
