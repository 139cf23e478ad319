#include "snapmla/engine.h"

#include <algorithm>
#include <chrono>
#include <set>
#include <string>
#include <utility>

#include "base/check.h"
#include "engine/backend_factory.h"
#include "engine/sampler.h"
#include "engine/stop_text.h"
#include "kv_cache/paged_cache.h"
#include "model/config.h"
#include "model/forward.h"
#include "model/generation_config.h"
#include "model/safetensors.h"
#include "model/tokenizer.h"
#include "model/weights.h"
#include "snapmla/error.h"

namespace snapmla {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Reading the files, and for a device copying them there: half of the progress each.
model::ModelWeights load(const model::Checkpoint& checkpoint, const ModelConfig& config,
                         Memory& memory, const model::LoadProgress& on_progress) {
  if (memory.host_accessible()) return model::load_weights(checkpoint, config, on_progress);
  const auto half = [&](bool second) -> model::LoadProgress {
    if (!on_progress) return {};
    return [&, second](std::int64_t done, std::int64_t total) {
      on_progress(second ? total + done : done, 2 * total);
    };
  };
  model::ModelWeights weights = model::load_weights(checkpoint, config, half(false));
  model::place_weights(weights, memory, half(true));
  checkpoint.check_reads();
  return weights;
}

SamplingParams recommended(const model::GenerationConfig& config) {
  SamplingParams params;
  if (!config.do_sample.value_or(config.temperature.has_value())) return params;
  params.temperature = static_cast<float>(config.temperature.value_or(1.0));
  params.top_p = static_cast<float>(config.top_p.value_or(1.0));
  params.min_p = static_cast<float>(config.min_p.value_or(0.0));
  params.top_k = static_cast<int>(config.top_k.value_or(0));
  return params;
}

std::int64_t pages_for(std::int64_t tokens) { return (tokens + kPageSize - 1) / kPageSize; }

}  // namespace

const char* to_string(FinishReason reason) noexcept {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
  }
  return "unknown";
}

struct Engine::Impl {
  EngineOptions options;
  ModelConfig config;
  std::unique_ptr<ops::OpSet> ops;
  model::Checkpoint checkpoint;  // keeps the mapped files that the weights point into
  model::ModelWeights weights;
  std::unique_ptr<Tokenizer> tokenizer;  // null when the directory has no tokenizer.json
  std::set<std::int32_t> end_tokens;
  SamplingParams sampling;  // the checkpoint's defaults
  std::int64_t max_len = 0;
  std::unique_ptr<PagedCache> cache;
  std::optional<model::KvFeedback> feedback;
  std::unique_ptr<model::Forward> forward;

  explicit Impl(EngineOptions given);
  void check_prompt(const std::vector<std::int32_t>& prompt) const;
  // Hidden state of the last prompt token, [1, hidden_size] in the backend's memory; empty when
  // keep_going, asked after every chunk, says no.
  TensorView prefill(SequencePages& pages, const std::vector<std::int32_t>& prompt,
                     std::int64_t reused, const std::function<bool()>& keep_going);
  // Logits of tokens [begin, end) through the prefill path, appended to `all`.
  void prefill_logits(SequencePages& pages, std::span<const std::int32_t> tokens,
                      std::vector<float>& all);
};

Engine::Impl::Impl(EngineOptions given)
    : options(std::move(given)),
      config(model::load_config(options.model_dir)),
      ops(engine::make_backend(options.backend, options.threads)),
      checkpoint(model::Checkpoint::open(options.model_dir)),
      weights(load(checkpoint, config, ops->memory(), options.on_load_progress)) {
  const std::filesystem::path dir(options.model_dir);
  if (std::filesystem::exists(dir / "tokenizer.json")) {
    tokenizer = std::make_unique<Tokenizer>(Tokenizer::load(dir));
  }
  // generation_config.json wins over config.json: chat models end turns with another token.
  const model::GenerationConfig generation = model::load_generation_config(dir);
  const auto& ends =
      generation.eos_token_ids.empty() ? config.eos_token_ids : generation.eos_token_ids;
  for (std::int64_t id : ends) end_tokens.insert(static_cast<std::int32_t>(id));
  sampling = recommended(generation);
  max_len = options.max_model_len > 0 ? options.max_model_len : config.max_position_embeddings;
  if (options.prefill_chunk < 1) {
    throw Error(
        ErrorCode::kInvalidArgument,
        "prefill_chunk: got " + std::to_string(options.prefill_chunk) + ", accepted is at least 1");
  }
  if (options.kv_rounding == KvRounding::kFeedback) {
    if (options.kv_cache != KvCacheFormat::kFp8) {
      throw Error(ErrorCode::kInvalidArgument,
                  str("kv_rounding: got feedback with a ", to_string(options.kv_cache),
                      " cache, accepted is feedback with fp8"));
    }
    feedback.emplace(config, weights, ops->memory(), options.threads);
  }
  const std::int64_t pool = options.kv_cache_tokens > 0 ? options.kv_cache_tokens : max_len;
  const auto does_not_fit = [&](const char* why) {
    const std::int64_t page = page_layout(options.kv_cache).page_bytes * config.num_hidden_layers;
    std::int64_t bytes = 0;
    const bool known = !__builtin_mul_overflow(pages_for(pool), page, &bytes);
    throw Error(ErrorCode::kOutOfMemory,
                str("got a cache pool of ", pool, " tokens, ",
                    known ? str(bytes, " bytes") : "more than 64 bits of bytes",
                    ", and positions up to ", max_len, ", which do not fit into memory (", why,
                    "); accepted is what fits: set a smaller --max-model-len (max_model_len)"));
  };
  try {
    cache = std::make_unique<PagedCache>(options.kv_cache, config.num_hidden_layers,
                                         pages_for(pool), ops->memory());
    forward = std::make_unique<model::Forward>(config, weights, *ops, *cache, max_len,
                                               options.scale_mode, options.numerics);
  } catch (const std::bad_alloc&) {
    does_not_fit("out of memory");
  } catch (const Error& e) {
    if (e.code() != ErrorCode::kOutOfMemory) throw;
    does_not_fit(e.what());
  }
  if (feedback) forward->round_latents_by(&*feedback);
}

void Engine::Impl::check_prompt(const std::vector<std::int32_t>& prompt) const {
  if (prompt.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "prompt: got no tokens, accepted is at least 1");
  }
  const std::int64_t length = static_cast<std::int64_t>(prompt.size());
  const std::int64_t limit = std::min(max_len, cache->allocator().num_pages() * kPageSize);
  if (length > limit) {
    throw Error(ErrorCode::kInvalidArgument, "prompt: got " + std::to_string(length) +
                                                 " tokens, accepted are at most " +
                                                 std::to_string(limit));
  }
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    if (prompt[i] < 0 || prompt[i] >= config.vocab_size) {
      throw Error(ErrorCode::kInvalidArgument,
                  "prompt: token " + std::to_string(i) + " is " + std::to_string(prompt[i]) +
                      ", accepted are 0 to " + std::to_string(config.vocab_size - 1));
    }
  }
}

TensorView Engine::Impl::prefill(SequencePages& pages, const std::vector<std::int32_t>& prompt,
                                 std::int64_t reused, const std::function<bool()>& keep_going) {
  const auto length = static_cast<std::int64_t>(prompt.size());
  TensorView hidden;
  std::int64_t rows = 0;
  for (std::int64_t at = reused; at < length; at += rows) {
    rows = std::min<std::int64_t>(options.prefill_chunk, length - at);
    hidden = forward->prefill(
        pages, at,
        std::span(prompt).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(rows)));
    checkpoint.check_reads();
    if (!keep_going()) return {};
  }
  return TensorView::of(hidden.row<float>(rows - 1), {1, config.hidden_size});
}

void Engine::Impl::prefill_logits(SequencePages& pages, std::span<const std::int32_t> tokens,
                                  std::vector<float>& all) {
  const auto length = static_cast<std::int64_t>(tokens.size());
  std::vector<float> part;
  std::int64_t rows = 0;
  for (std::int64_t at = 0; at < length; at += rows) {
    rows = std::min<std::int64_t>(options.prefill_chunk, length - at);
    forward->logits(forward->prefill(pages, at,
                                     tokens.subspan(static_cast<std::size_t>(at),
                                                    static_cast<std::size_t>(rows))),
                    part);
    checkpoint.check_reads();
    all.insert(all.end(), part.begin(), part.end());
  }
}

Engine::Engine(EngineOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;

const ModelConfig& Engine::config() const { return impl_->config; }
const EngineOptions& Engine::options() const { return impl_->options; }
SamplingParams Engine::default_sampling() const { return impl_->sampling; }
std::string Engine::backend_name() const { return impl_->ops->name(); }

const Tokenizer& Engine::tokenizer() const {
  if (!impl_->tokenizer) {
    throw Error(ErrorCode::kNotFound, impl_->options.model_dir + "/tokenizer.json: no such file");
  }
  return *impl_->tokenizer;
}

std::vector<std::int32_t> Engine::encode(std::string_view text) const {
  return tokenizer().encode(text);
}

std::string Engine::decode(std::span<const std::int32_t> tokens) const {
  return tokenizer().decode(tokens);
}

std::int64_t Engine::cache_bytes_per_token() const {
  return impl_->cache->bytes_per_page() / kPageSize * impl_->config.num_hidden_layers;
}

RequestOutput Engine::generate(const std::vector<std::int32_t>& prompt_tokens,
                               const SamplingParams& params,
                               const std::function<bool(const std::string& text)>& on_text) {
  Impl& e = *impl_;
  e.check_prompt(prompt_tokens);
  engine::Sampler sampler(params);
  RequestOutput result;
  result.prompt_tokens = prompt_tokens;
  const auto prompt_length = static_cast<std::int64_t>(prompt_tokens.size());

  SequencePages pages(*e.cache);
  const auto start = std::chrono::steady_clock::now();
  // The last prompt token is always computed: its logits are what comes next.
  result.reused_tokens = pages.reuse_prefix(prompt_tokens, prompt_length - 1);
  if (!pages.extend(prompt_length - result.reused_tokens)) {
    throw Error(ErrorCode::kOutOfMemory, "the cache pool has no room for a prompt of " +
                                             std::to_string(prompt_length) + " tokens");
  }
  const auto show = [&](const std::string& piece) { return !on_text || on_text(piece); };
  TensorView hidden =
      e.prefill(pages, prompt_tokens, result.reused_tokens, [&] { return show(""); });
  result.prompt_seconds = seconds_since(start);
  result.cache_bytes = static_cast<std::int64_t>(pages.table().size()) * e.cache->bytes_per_page() *
                       e.config.num_hidden_layers;
  if (hidden.empty()) {
    result.finish_reason = FinishReason::kCancelled;
    return result;
  }
  e.cache->prefix_index().insert(prompt_tokens, pages.table());

  const auto decode_start = std::chrono::steady_clock::now();
  engine::StopText text(e.tokenizer.get(), params.stop);
  std::vector<float> logits;
  while (static_cast<std::int64_t>(result.tokens.size()) < params.max_tokens) {
    e.forward->logits(hidden, logits);
    const std::int32_t token = sampler.sample(logits);
    if (!params.ignore_eos && e.end_tokens.contains(token)) {
      result.finish_reason = FinishReason::kStop;
      break;
    }
    result.tokens.push_back(token);
    const bool go_on = show(text.push(token));
    if (text.stopped()) {
      result.finish_reason = FinishReason::kStop;
      break;
    }
    if (!go_on) {
      result.finish_reason = FinishReason::kCancelled;
      break;
    }
    if (static_cast<std::int64_t>(result.tokens.size()) == params.max_tokens) break;
    if (pages.length() + 1 > e.max_len || !pages.extend(1)) break;
    const SequencePages* sequence = &pages;
    hidden = e.forward->decode({&sequence, 1}, 1, {&token, 1});
    e.checkpoint.check_reads();
  }
  e.checkpoint.check_reads();  // of the last logits too
  if (!text.stopped()) {
    const std::string rest = text.finish();
    if (!rest.empty()) show(rest);
  }
  result.text = text.text();
  result.decode_seconds = seconds_since(decode_start);
  result.cache_bytes = static_cast<std::int64_t>(pages.table().size()) * e.cache->bytes_per_page() *
                       e.config.num_hidden_layers;
  return result;
}

std::vector<float> Engine::logits(const std::vector<std::int32_t>& tokens) {
  return decode_logits(tokens, static_cast<std::int64_t>(tokens.size()), 1);
}

std::vector<float> Engine::decode_logits(const std::vector<std::int32_t>& tokens,
                                         std::int64_t prefill_tokens, int seqlen_q) {
  Impl& e = *impl_;
  e.check_prompt(tokens);
  const auto length = static_cast<std::int64_t>(tokens.size());
  require(prefill_tokens >= 1 && prefill_tokens <= length, "prefill_tokens", prefill_tokens,
          "at least 1, at most the number of tokens");
  require(seqlen_q >= 1 && seqlen_q <= kMaxSeqlenQ, "seqlen_q", seqlen_q, "1 to 16");
  SequencePages pages(*e.cache);
  const auto extend = [&](std::int64_t count) {
    if (pages.extend(count)) return;
    throw Error(ErrorCode::kOutOfMemory,
                "the cache pool has no room for " + std::to_string(length) + " tokens");
  };
  std::vector<float> all, part;
  all.reserve(static_cast<std::size_t>(length * e.config.vocab_size));
  extend(prefill_tokens);
  e.prefill_logits(pages, std::span(tokens).first(static_cast<std::size_t>(prefill_tokens)), all);
  std::int64_t rows = 0;
  for (std::int64_t at = prefill_tokens; at < length; at += rows) {
    rows = std::min<std::int64_t>(seqlen_q, length - at);
    extend(rows);
    const SequencePages* sequence = &pages;
    const auto step =
        std::span(tokens).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(rows));
    e.forward->logits(e.forward->decode({&sequence, 1}, static_cast<int>(rows), step), part);
    e.checkpoint.check_reads();
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

}  // namespace snapmla
