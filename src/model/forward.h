// The DeepSeek-V2/V3 forward pass, once for all backends, in terms of OpSet operations.
//
//   block:    x += Attn(RMSNorm(x));  x += FFN(RMSNorm(x))
//
//   prefill:  naive MLA over all keys of the sequence, read back from the cache. Every key, the
//             chunk's own included, has gone through the cache's quantiser, so that the result for
//             a token does not depend on how the prompt was cut or on which pages were found in the
//             prefix index: bit for bit.
//
//   decode:   absorbed MLA: W_UK is folded into the query, W_UV into the output; attention runs on
//             latents.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <span>
#include <utility>
#include <vector>

#include "kv_cache/paged_cache.h"
#include "model/kv_feedback.h"
#include "model/weights.h"
#include "ops/op_set.h"
#include "snapmla/mla.h"
#include "snapmla/model_config.h"
#include "tensor/memory.h"

namespace snapmla::model {

// Sees the queries of every layer when attention is about to use them. q is [tokens, heads, nope +
// rope] f32 in the backend's memory, the rope part rotated; positions are the tokens'.
using QueryObserver = std::function<void(
    std::int64_t layer, std::span<const std::int32_t> positions, const TensorView& q)>;

// Not thread-safe: it owns the scratch memory of a step. The references must outlive it.
class Forward {
 public:
  // max_positions: rows of the RoPE table, hence the longest sequence.
  Forward(const ModelConfig& config, const ModelWeights& weights, ops::OpSet& ops,
          PagedCache& cache, std::int64_t max_positions, ScaleMode scale_mode,
          DecodeNumerics numerics);

  // Prompt tokens at positions [begin, begin + tokens.size()) of a sequence whose pages have room
  // for them. Returns the hidden states after the final norm, [tokens.size(), hidden_size] f32 in
  // the backend's memory, valid until the next prefill or decode. Throws kInvalidArgument for a
  // token outside the vocabulary.
  TensorView prefill(const SequencePages& pages, std::int64_t begin,
                     std::span<const std::int32_t> tokens);

  // seqlen_q new tokens for each sequence, the last ones of its length(): tokens is [batch,
  // seqlen_q]. Returns [batch * seqlen_q, hidden_size] f32 as above.
  TensorView decode(std::span<const SequencePages* const> sequences, int seqlen_q,
                    std::span<const std::int32_t> tokens);

  // Called after every layer with the output of its attention (after o_proj, before it is added)
  // and the hidden states it leaves, [tokens, hidden_size] f32 in the backend's memory, valid
  // during the call. Empty: nobody looks.
  using LayerObserver = std::function<void(std::int64_t layer, const TensorView& attention,
                                           const TensorView& hidden)>;
  void observe_layers(LayerObserver observer) { layer_observer_ = std::move(observer); }

  // lm_head on rows of hidden states, as prefill and decode return them: [rows, hidden_size] ->
  // [rows, vocab_size] f32 on the host.
  void logits(const TensorView& hidden, std::vector<float>& out);

  // From now on latents are rounded by `feedback` before they are stored; null: to nearest. For an
  // FP8 cache.
  void round_latents_by(const KvFeedback* feedback) { feedback_ = feedback; }

  // For measurements; an empty observer ends them.
  void observe_queries(QueryObserver observer) { observer_ = std::move(observer); }

 private:
  struct Step;  // what one call is about: positions, slots, and how attention runs

  TensorView run(Step& step, std::span<const std::int32_t> tokens);
  void check_tokens(std::span<const std::int32_t> tokens) const;
  // The same numbers where the backend can read them: on the host the given ones, else a copy.
  template <class T>
  TensorView place(Buffer& buffer, std::span<const T> from,
                   std::initializer_list<std::int64_t> shape);
  // The buffer's memory, grown to n elements if need be.
  template <class T = float>
  T* need(Buffer& buffer, std::int64_t n);
  void attention(const Step& step, std::int64_t layer);
  void prefill_attention(const Step& step, std::int64_t layer);
  void decode_attention(const Step& step, std::int64_t layer);
  void query(const LayerWeights& w, std::int64_t n);
  void append(const Step& step, const LayerWeights& w, std::int64_t layer);
  void rotate(const TensorView& x, const TensorView& positions);
  void ffn(const LayerWeights& w, std::int64_t n);
  void dense_ffn(const ops::Weight& gate, const ops::Weight& up, const ops::Weight& down,
                 std::int64_t n);
  void moe_ffn(const LayerWeights& w, std::int64_t n);
  void rms_norm(const Buffer& x, const TensorView& weight, double eps, std::int64_t n,
                std::int64_t width, Buffer& out);
  void linear(const Buffer& x, const ops::Weight& w, std::int64_t n, Buffer& out);

  const ModelConfig& config_;
  const ModelWeights& weights_;
  ops::OpSet& ops_;
  Memory& memory_;
  PagedCache& cache_;
  ScaleMode scale_mode_;
  DecodeNumerics numerics_;
  std::int64_t max_positions_;
  const KvFeedback* feedback_ = nullptr;
  QueryObserver observer_;
  LayerObserver layer_observer_;
  Buffer rope_table_;  // [max_positions, rope] f32 cos, sin pairs

  // Scratch in the backend's memory, [tokens, ...] f32 unless said otherwise.
  Buffer x_, normed_, q_, q_low_, kv_, latent_, k_rope_, attn_, proj_, gate_, up_, out_, logits_;
  Buffer keys_latent_, keys_rope_, keys_expanded_, router_, router_weights_;
  Buffer q_latent_, q_rope_, attn_latent_, q_scale_;
  Buffer q_codes_;                                    // e4m3
  Buffer q_latent16_, q_rope16_, q_rope_codes_;       // bf16
  Buffer router_ids_;                                 // i32
  Buffer ids_, positions_, slots_, table_, lengths_;  // a step's integers, off the host
};

}  // namespace snapmla::model
