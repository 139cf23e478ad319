// The engine: a checkpoint on disk to text.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "snapmla/kv_cache.h"
#include "snapmla/mla.h"
#include "snapmla/model_config.h"

namespace snapmla {

struct EngineOptions {
  std::string model_dir;
  std::string backend = "auto";  // auto | cuda | cpu | ref (environment: SNAPMLA_BACKEND)
  KvCacheFormat kv_cache = KvCacheFormat::kFp8;
  ScaleMode scale_mode = ScaleMode::kAmax;
  // kFeedback wants an FP8 cache, and makes its matrices from kv_b_proj when the model is loaded.
  KvRounding kv_rounding = KvRounding::kNearest;
  DecodeNumerics numerics;
  std::int64_t max_model_len = 0;    // tokens per sequence; 0 = max_position_embeddings
  std::int64_t kv_cache_tokens = 0;  // pool size in tokens; 0 = max_model_len
  int prefill_chunk = 512;           // prompt tokens per forward; never changes a result
  int threads = 0;                   // 0 = all that the process may use
  // Called while weights are loaded, with bytes of the checkpoint's files.
  std::function<void(std::int64_t done, std::int64_t total)> on_load_progress;
};

// temperature 0 = greedy. Filters apply in the order top_k, top_p, min_p, on the tempered
// distribution.
struct SamplingParams {
  float temperature = 0.0f;
  float top_p = 1.0f;
  float min_p = 0.0f;
  int top_k = 0;  // 0 = off
  std::uint64_t seed = 0;
  std::int64_t max_tokens = 128;
  std::vector<std::string> stop;  // text is cut before the first stop string
  bool ignore_eos = false;
};

// kCancelled: on_text returned false.
enum class FinishReason : std::uint8_t { kStop, kLength, kCancelled };
const char* to_string(FinishReason reason) noexcept;

struct RequestOutput {
  std::vector<std::int32_t> prompt_tokens;
  std::vector<std::int32_t> tokens;  // generated, without the end token
  std::string text;                  // valid UTF-8
  FinishReason finish_reason = FinishReason::kLength;
  std::int64_t reused_tokens = 0;  // prompt tokens whose pages were found in the prefix index
  double prompt_seconds = 0, decode_seconds = 0;
  std::int64_t cache_bytes = 0;  // bytes of the pages this request used, all layers
};

class Tokenizer;  // src/model/tokenizer.h

// Threads. generate, logits and decode_logits use one set of buffers: one call at a time per
// engine, from whichever thread; a program that shares an engine keeps its calls apart (on_text
// runs on the calling thread, inside the call). The const functions only read what the constructor
// made: any number of threads may call them at any time, also during those calls. Different engines
// share nothing that changes, and work at the same time in different threads. Making and destroying
// one, and moving from it, need it to be unused.
class Engine {
 public:
  // Loads the checkpoint. Throws Error: kNotFound / kInvalidFile / kUnsupported name the file and
  // field.
  explicit Engine(EngineOptions options);
  ~Engine();
  Engine(Engine&&) noexcept;

  const ModelConfig& config() const;
  const Tokenizer& tokenizer() const;
  const EngineOptions& options() const;
  std::string backend_name() const;
  std::int64_t cache_bytes_per_token() const;  // all layers

  // Text to prompt tokens, with the BOS that the checkpoint's tokenizer asks for, and back (special
  // tokens left out). Throws kNotFound when the checkpoint has no tokenizer.json.
  std::vector<std::int32_t> encode(std::string_view text) const;
  std::string decode(std::span<const std::int32_t> tokens) const;

  // What the checkpoint's author recommends (generation_config.json: temperature, top_p, top_k,
  // min_p; greedy where do_sample is false or nothing is said); the other fields are the defaults.
  SamplingParams default_sampling() const;

  // Runs one request to its end. on_text receives the new text as it becomes valid UTF-8. It is
  // called after every chunk of the prompt and every token, with an empty text where there is
  // nothing new to show, so that returning false cancels at any time. Throws kInvalidArgument when
  // the prompt is empty, holds an id outside the vocabulary or does not fit max_model_len, kIo when
  // a file of the checkpoint changed under the engine.
  RequestOutput generate(const std::vector<std::int32_t>& prompt_tokens,
                         const SamplingParams& params,
                         const std::function<bool(const std::string& text)>& on_text = {});

  // Logits for every position of `tokens`, prefill path: [tokens.size(), vocab_size] f32.
  std::vector<float> logits(const std::vector<std::int32_t>& tokens);

  // The same through the decode path: the first prefill_tokens (at least 1) as a prompt, the others
  // seqlen_q (1..16) per step, as speculative decoding verifies drafts.
  std::vector<float> decode_logits(const std::vector<std::int32_t>& tokens,
                                   std::int64_t prefill_tokens, int seqlen_q);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace snapmla
