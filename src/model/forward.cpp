#include "model/forward.h"

#include <algorithm>
#include <string>

#include "model/rope_table.h"
#include "ops/ops.h"
#include "snapmla/error.h"

namespace snapmla::model {

struct Forward::Step {
  std::vector<std::int32_t> positions;     // [tokens]
  std::vector<std::int64_t> slots;         // [tokens]
  TensorView positions_view, slots_view;   // the same, where the backend can read them
  TensorView table_view, lengths_view;     // prefill: [pages]; decode: [batch, max_pages], [batch]
  const SequencePages* prefill = nullptr;  // prefill: the one sequence
  std::int64_t begin = 0;                  // prefill: position of the first token
  int seqlen_q = 0;                        // decode
  std::vector<std::int32_t> tables;        // decode: [batch, max_pages]
  std::vector<std::int32_t> seqlens;       // decode: [batch]
  std::int64_t max_pages = 0;

  std::int64_t size() const { return static_cast<std::int64_t>(positions.size()); }
  void add(const SequencePages& pages, std::int64_t position) {
    positions.push_back(static_cast<std::int32_t>(position));
    slots.push_back(pages.slot(position));
  }
};

namespace {

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

TensorView f32(const Buffer& buffer, std::initializer_list<std::int64_t> shape) {
  return TensorView(buffer.data(), DType::kF32, shape);
}

// Elements from `offset` on of a scratch buffer.
TensorView f32_from(const Buffer& buffer, std::int64_t offset,
                    std::initializer_list<std::int64_t> shape) {
  return TensorView(static_cast<float*>(buffer.data()) + offset, DType::kF32, shape);
}

}  // namespace

template <class T>
T* Forward::need(Buffer& buffer, std::int64_t n) {
  buffer.grow(memory_, n * static_cast<std::int64_t>(sizeof(T)));
  return static_cast<T*>(buffer.data());
}

template <class T>
TensorView Forward::place(Buffer& buffer, std::span<const T> from,
                          std::initializer_list<std::int64_t> shape) {
  if (memory_.host_accessible()) return TensorView::of(from.data(), shape);
  T* to = need<T>(buffer, static_cast<std::int64_t>(from.size()));
  memory_.upload(to, from.data(), static_cast<std::int64_t>(from.size_bytes()));
  return TensorView::of(to, shape);
}

Forward::Forward(const ModelConfig& config, const ModelWeights& weights, ops::OpSet& ops,
                 PagedCache& cache, std::int64_t max_positions, ScaleMode scale_mode,
                 DecodeNumerics numerics)
    : config_(config),
      weights_(weights),
      ops_(ops),
      memory_(ops.memory()),
      cache_(cache),
      scale_mode_(scale_mode),
      numerics_(numerics),
      max_positions_(max_positions) {
  const std::vector<float> table = build_rope_table(config, max_positions);
  memory_.upload(need(rope_table_, static_cast<std::int64_t>(table.size())), table.data(),
                 static_cast<std::int64_t>(table.size() * sizeof(float)));
}

void Forward::linear(const Buffer& x, const ops::Weight& w, std::int64_t n, Buffer& out) {
  need(out, n * w.out_features());
  ops::linear(ops_, {f32(x, {n, w.in_features()}), w, f32(out, {n, w.out_features()})});
}

void Forward::rms_norm(const Buffer& x, const TensorView& weight, double eps, std::int64_t n,
                       std::int64_t width, Buffer& out) {
  need(out, n * width);
  ops::rms_norm(ops_, {f32(x, {n, width}), weight, static_cast<float>(eps), f32(out, {n, width})});
}

TensorView Forward::prefill(const SequencePages& pages, std::int64_t begin,
                            std::span<const std::int32_t> tokens) {
  Step step;
  step.prefill = &pages;
  step.begin = begin;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    step.add(pages, begin + static_cast<std::int64_t>(i));
  }
  return run(step, tokens);
}

TensorView Forward::decode(std::span<const SequencePages* const> sequences, int seqlen_q,
                           std::span<const std::int32_t> tokens) {
  Step step;
  step.seqlen_q = seqlen_q;
  for (const SequencePages* s : sequences) {
    step.max_pages = std::max(step.max_pages, static_cast<std::int64_t>(s->table().size()));
    step.seqlens.push_back(static_cast<std::int32_t>(s->length()));
    for (int t = 0; t < seqlen_q; ++t) step.add(*s, s->length() - seqlen_q + t);
  }
  step.tables.assign(sequences.size() * sz(step.max_pages), -1);
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    std::ranges::copy(sequences[b]->table(),
                      step.tables.begin() + static_cast<std::ptrdiff_t>(b * sz(step.max_pages)));
  }
  return run(step, tokens);
}

void Forward::check_tokens(std::span<const std::int32_t> tokens) const {
  for (std::int32_t id : tokens) {
    if (id < 0 || id >= config_.vocab_size) {
      throw Error(ErrorCode::kInvalidArgument, "ids: got token id " + std::to_string(id) +
                                                   ", accepted is 0 to " +
                                                   std::to_string(config_.vocab_size - 1));
    }
  }
}

TensorView Forward::run(Step& step, std::span<const std::int32_t> tokens) {
  const std::int64_t n = step.size(), width = config_.hidden_size;
  if (n == 0) return {};
  check_tokens(tokens);
  if (*std::ranges::max_element(step.positions) >= max_positions_) {
    throw Error(ErrorCode::kInvalidArgument,
                "position " + std::to_string(*std::ranges::max_element(step.positions)) +
                    " lies outside the RoPE table of " + std::to_string(max_positions_) + " rows");
  }
  step.positions_view = place<std::int32_t>(positions_, step.positions, {n});
  step.slots_view = place<std::int64_t>(slots_, step.slots, {n});
  if (step.prefill) {
    const auto table = step.prefill->table();
    step.table_view = place(table_, table, {static_cast<std::int64_t>(table.size())});
  } else {
    const std::int64_t batch = static_cast<std::int64_t>(step.seqlens.size());
    step.table_view = place<std::int32_t>(table_, step.tables, {batch, step.max_pages});
    step.lengths_view = place<std::int32_t>(lengths_, step.seqlens, {batch});
  }
  need(x_, n * width);
  const TensorView x = f32(x_, {n, width});
  ops::embed(ops_, {weights_.embed, place(ids_, tokens, {n}), x});
  const ops::StepScope scope(ops_);
  for (std::int64_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
    const LayerWeights& w = weights_.layers[sz(layer)];
    rms_norm(x_, w.attn_norm, config_.rms_norm_eps, n, width, normed_);
    attention(step, layer);  // leaves its result in proj_
    ops::add(ops_, f32(proj_, {n, width}), x);
    rms_norm(x_, w.ffn_norm, config_.rms_norm_eps, n, width, normed_);
    ffn(w, n);  // leaves its result in out_
    ops::add(ops_, f32(out_, {n, width}), x);
    if (layer_observer_) layer_observer_(layer, f32(proj_, {n, width}), x);
  }
  rms_norm(x_, weights_.final_norm, config_.rms_norm_eps, n, width, normed_);
  return f32(normed_, {n, width});
}

// Leaves pairs interleaved, as pages hold them: scores need only the same order in query and key.
void Forward::rotate(const TensorView& x, const TensorView& positions) {
  ops::rope(ops_, {x, positions, f32(rope_table_, {max_positions_, config_.qk_rope_head_dim}),
                   config_.rope_interleave, true});
}

void Forward::query(const LayerWeights& w, std::int64_t n) {
  if (config_.q_lora_rank) {
    linear(normed_, w.q_a, n, q_low_);
    rms_norm(q_low_, w.q_a_norm, config_.mla_norm_eps, n, *config_.q_lora_rank, q_low_);
    linear(q_low_, w.q_b, n, q_);
  } else {
    linear(normed_, w.q_proj, n, q_);
  }
}

// c = RMSNorm(first kv_lora_rank outputs of kv_a), k_rope = RoPE(the rest): what the cache stores.
void Forward::append(const Step& step, const LayerWeights& w, std::int64_t layer) {
  const std::int64_t n = step.size(), rank = config_.kv_lora_rank, rope = config_.qk_rope_head_dim;
  linear(normed_, w.kv_a, n, kv_);
  need(latent_, n * rank);
  need(k_rope_, n * rope);
  const TensorView latent = f32(latent_, {n, rank}), k_rope = f32(k_rope_, {n, rope});
  ops::rms_norm(ops_, {f32(kv_, {n, rank}).with_stride(0, rank + rope), w.kv_a_norm,
                       static_cast<float>(config_.mla_norm_eps), latent});
  ops::copy_rows(ops_, {f32_from(kv_, rank, {n, rope}).with_stride(0, rank + rope), k_rope});
  rotate(f32(k_rope_, {n, 1, rope}), step.positions_view);
  if (feedback_) ops::round_latents(ops_, {latent, k_rope, feedback_->layer(layer), scale_mode_});
  ops::append_kv(ops_, {latent, k_rope, step.slots_view, cache_.layer(layer), scale_mode_});
}

void Forward::attention(const Step& step, std::int64_t layer) {
  const LayerWeights& w = weights_.layers[sz(layer)];
  const std::int64_t n = step.size(), heads = config_.num_attention_heads;
  query(w, n);
  rotate(f32_from(q_, config_.qk_nope_head_dim, {n, heads, config_.qk_rope_head_dim})
             .with_stride(0, heads * config_.qk_head_dim())
             .with_stride(1, config_.qk_head_dim()),
         step.positions_view);
  append(step, w, layer);
  if (observer_) observer_(layer, step.positions, f32(q_, {n, heads, config_.qk_head_dim()}));
  if (step.prefill) {
    prefill_attention(step, layer);
  } else {
    decode_attention(step, layer);
  }
  linear(attn_, w.o_proj, n, proj_);
}

void Forward::prefill_attention(const Step& step, std::int64_t layer) {
  const LayerWeights& w = weights_.layers[sz(layer)];
  const std::int64_t n = step.size(), heads = config_.num_attention_heads;
  const std::int64_t rank = config_.kv_lora_rank, rope = config_.qk_rope_head_dim;
  const std::int64_t nope = config_.qk_nope_head_dim, v_dim = config_.v_head_dim;
  const std::int64_t keys = step.begin + n;
  need(keys_latent_, keys * rank);
  need(keys_rope_, keys * rope);
  const TensorView keys_rope = f32(keys_rope_, {keys, rope});
  ops::fetch_dequant(ops_, {cache_.layer(layer), step.table_view, 0, keys,
                            f32(keys_latent_, {keys, rank}), keys_rope});
  linear(keys_latent_, w.kv_b, keys, keys_expanded_);
  const std::int64_t per_head = nope + v_dim;
  const auto expanded = [&](std::int64_t offset, std::int64_t width) {
    return f32_from(keys_expanded_, offset, {keys, heads, width})
        .with_stride(0, heads * per_head)
        .with_stride(1, per_head);
  };
  need(attn_, n * heads * v_dim);
  ops::mla_prefill(
      ops_,
      {f32(q_, {n, heads, nope + rope}), expanded(0, nope), keys_rope, expanded(nope, v_dim),
       step.begin, static_cast<float>(config_.softmax_scale()), f32(attn_, {n, heads, v_dim})});
}

void Forward::decode_attention(const Step& step, std::int64_t layer) {
  const LayerWeights& w = weights_.layers[sz(layer)];
  const std::int64_t n = step.size(), heads = config_.num_attention_heads;
  const std::int64_t rank = config_.kv_lora_rank, rope = config_.qk_rope_head_dim;
  const std::int64_t nope = config_.qk_nope_head_dim, head_dim = nope + rope;
  const std::int64_t seqlen_q = step.seqlen_q, batch = n / seqlen_q;
  need(q_latent_, n * heads * rank);
  ops::head_linear(
      ops_, {f32(q_, {n, heads, nope}).with_stride(0, heads * head_dim).with_stride(1, head_dim),
             w.w_uk, f32(q_latent_, {n, heads, rank})});
  const TensorView latent = f32(q_latent_, {n * heads, rank});
  const TensorView rotated = f32_from(q_, nope, {n * heads, rope}).with_stride(0, head_dim);
  const auto query = [&](const Buffer& buffer, DType type, std::int64_t width) {
    return TensorView(buffer.data(), type, {batch, seqlen_q, heads, width});
  };

  MlaDecodeArgs args;
  args.cache = cache_.layer(layer);
  if (cache_.format() == KvCacheFormat::kF32) {
    need(q_rope_, n * heads * rope);
    ops::copy_rows(ops_, {rotated, f32(q_rope_, {n * heads, rope})});
    args.q_latent = query(q_latent_, DType::kF32, rank);
    args.q_rope = query(q_rope_, DType::kF32, rope);
  } else {
    // The absorbed query is a BF16 tensor on every backend, quantised or not.
    need<BFloat16>(q_latent16_, n * heads * rank);
    need<BFloat16>(q_rope16_, n * heads * rope);
    args.q_latent = query(q_latent16_, DType::kBF16, rank);
    args.q_rope = query(q_rope16_, DType::kBF16, rope);
    ops::copy_rows(ops_, {latent, TensorView(q_latent16_.data(), DType::kBF16, {n * heads, rank})});
    ops::copy_rows(ops_, {rotated, TensorView(q_rope16_.data(), DType::kBF16, {n * heads, rope})});
  }
  if (cache_.format() == KvCacheFormat::kFp8) {
    need<Float8E4M3>(q_codes_, n * heads * rank);
    need<BFloat16>(q_rope_codes_, n * heads * rope);
    need(q_scale_, n * heads);
    const QuantizeQArgs quantize{args.q_latent,
                                 args.q_rope,
                                 query(q_codes_, DType::kE4M3, rank),
                                 query(q_rope_codes_, DType::kBF16, rope),
                                 f32(q_scale_, {batch, seqlen_q, heads}),
                                 scale_mode_};
    ops::quantize_q(ops_, quantize);
    args.q_latent = quantize.q_latent_out;
    args.q_rope = quantize.q_rope_out;
    args.q_scale = quantize.q_scale_out;
  }
  args.block_table = step.table_view;
  args.cache_seqlens = step.lengths_view;
  args.softmax_scale = static_cast<float>(config_.softmax_scale());
  need(attn_latent_, n * heads * rank);
  args.out = query(attn_latent_, DType::kF32, rank);
  args.numerics = numerics_;
  ops::mla_decode(ops_, args);
  need(attn_, n * heads * config_.v_head_dim);
  ops::head_linear(ops_, {f32(attn_latent_, {n, heads, rank}), w.w_uv,
                          f32(attn_, {n, heads, config_.v_head_dim})});
}

void Forward::dense_ffn(const ops::Weight& gate, const ops::Weight& up, const ops::Weight& down,
                        std::int64_t n) {
  linear(normed_, gate, n, gate_);
  linear(normed_, up, n, up_);
  const std::int64_t width = gate.out_features();
  const TensorView g = f32(gate_, {n, width});
  ops::swiglu(ops_, {g, f32(up_, {n, width}), g});
  linear(gate_, down, n, out_);
}

void Forward::moe_ffn(const LayerWeights& w, std::int64_t n) {
  const std::int64_t experts = config_.num_experts, top_k = config_.experts_per_token;
  linear(normed_, w.router, n, router_);
  need<std::int32_t>(router_ids_, n * top_k);
  need(router_weights_, n * top_k);
  ops::MoeRouteArgs route;
  route.logits = f32(router_, {n, experts});
  route.bias = w.router_bias;
  route.kind = static_cast<ops::RouterKind>(config_.routing);
  route.num_groups = static_cast<int>(config_.n_group);
  route.groups_kept = static_cast<int>(config_.topk_group);
  route.top_k = static_cast<int>(top_k);
  route.normalize = config_.norm_topk_prob;
  route.scaling_factor = static_cast<float>(config_.routed_scaling_factor);
  route.ids = TensorView(router_ids_.data(), DType::kI32, {n, top_k});
  route.weights = f32(router_weights_, {n, top_k});
  ops::moe_route(ops_, route);
  if (config_.num_shared_experts > 0) {
    dense_ffn(w.shared_gate, w.shared_up, w.shared_down, n);
  } else {
    memory_.clear(need(out_, n * config_.hidden_size),
                  n * config_.hidden_size * static_cast<std::int64_t>(sizeof(float)));
  }
  ops::moe_ffn(ops_, {f32(normed_, {n, config_.hidden_size}), route.ids, route.weights, &w.experts,
                      f32(out_, {n, config_.hidden_size})});
}

void Forward::ffn(const LayerWeights& w, std::int64_t n) {
  if (w.experts.empty()) {
    dense_ffn(w.gate, w.up, w.down, n);
  } else {
    moe_ffn(w, n);
  }
}

void Forward::logits(const TensorView& hidden, std::vector<float>& out) {
  const std::int64_t rows = hidden.dim(0), vocab = config_.vocab_size;
  out.resize(sz(rows * vocab));
  if (memory_.host_accessible()) {
    ops::linear(ops_, {hidden, weights_.lm_head, TensorView::of(out.data(), {rows, vocab})});
    return;
  }
  need(logits_, rows * vocab);
  ops::linear(ops_, {hidden, weights_.lm_head, f32(logits_, {rows, vocab})});
  memory_.download(out.data(), logits_.data(),
                   rows * vocab * static_cast<std::int64_t>(sizeof(float)));
}

}  // namespace snapmla::model
