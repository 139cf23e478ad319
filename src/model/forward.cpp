#include "model/forward.h"

#include <algorithm>
#include <string>

#include "model/rope_table.h"
#include "numeric/float_types.h"
#include "ops/ops.h"
#include "snapmla/error.h"

namespace snapmla::model {

struct Forward::Step {
  std::vector<std::int32_t> positions;     // [tokens]
  std::vector<std::int64_t> slots;         // [tokens]
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

// Grows a scratch buffer; contents are not kept.
float* need(std::vector<float>& buffer, std::int64_t n) {
  if (buffer.size() < sz(n)) buffer.resize(sz(n));
  return buffer.data();
}

void to_bf16(std::span<const float> from, std::vector<BFloat16>& to) {
  to.resize(from.size());
  std::transform(from.begin(), from.end(), to.begin(), numeric::bf16_from_float);
}

}  // namespace

Forward::Forward(const ModelConfig& config, const ModelWeights& weights, ops::OpSet& ops,
                 PagedCache& cache, std::int64_t max_positions, ScaleMode scale_mode,
                 DecodeNumerics numerics)
    : config_(config),
      weights_(weights),
      ops_(ops),
      cache_(cache),
      scale_mode_(scale_mode),
      numerics_(numerics),
      max_positions_(max_positions),
      rope_table_(build_rope_table(config, max_positions)) {}

void Forward::linear(const std::vector<float>& x, const ops::Weight& w, std::int64_t n,
                     std::vector<float>& out) {
  ops::linear(ops_, {TensorView::of(x.data(), {n, w.in_features()}), w,
                     TensorView::of(need(out, n * w.out_features()), {n, w.out_features()})});
}

void Forward::rms_norm(const std::vector<float>& x, const TensorView& weight, double eps,
                       std::int64_t n, std::int64_t width, std::vector<float>& out) {
  ops::rms_norm(ops_, {TensorView::of(x.data(), {n, width}), weight, static_cast<float>(eps),
                       TensorView::of(need(out, n * width), {n, width})});
}

std::span<const float> Forward::prefill(const SequencePages& pages, std::int64_t begin,
                                        std::span<const std::int32_t> tokens) {
  Step step;
  step.prefill = &pages;
  step.begin = begin;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    step.add(pages, begin + static_cast<std::int64_t>(i));
  }
  return run(step, tokens);
}

std::span<const float> Forward::decode(std::span<const SequencePages* const> sequences,
                                       int seqlen_q, std::span<const std::int32_t> tokens) {
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

std::span<const float> Forward::run(const Step& step, std::span<const std::int32_t> tokens) {
  const std::int64_t n = step.size(), width = config_.hidden_size;
  if (n == 0) return {};
  if (*std::ranges::max_element(step.positions) >= max_positions_) {
    throw Error(ErrorCode::kInvalidArgument,
                "position " + std::to_string(*std::ranges::max_element(step.positions)) +
                    " lies outside the RoPE table of " + std::to_string(max_positions_) + " rows");
  }
  const TensorView x = TensorView::of(need(x_, n * width), {n, width});
  ops::embed(ops_, {weights_.embed, TensorView::of(tokens.data(), {n}), x});
  for (std::int64_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
    const LayerWeights& w = weights_.layers[sz(layer)];
    rms_norm(x_, w.attn_norm, config_.rms_norm_eps, n, width, normed_);
    attention(step, layer);  // leaves its result in proj_
    ops::add(ops_, TensorView::of(proj_.data(), {n, width}), x);
    rms_norm(x_, w.ffn_norm, config_.rms_norm_eps, n, width, normed_);
    ffn(w, n);  // leaves its result in out_
    ops::add(ops_, TensorView::of(out_.data(), {n, width}), x);
  }
  rms_norm(x_, weights_.final_norm, config_.rms_norm_eps, n, width, normed_);
  return std::span<const float>(normed_).first(sz(n * width));
}

void Forward::rotate(float* x, std::int64_t n, std::int64_t heads, std::int64_t row_stride,
                     std::int64_t head_stride, const TensorView& positions) {
  const std::int64_t rope = config_.qk_rope_head_dim;
  const TensorView view =
      TensorView::of(x, {n, heads, rope}).with_stride(0, row_stride).with_stride(1, head_stride);
  ops::rope(ops_, {view, positions, TensorView::of(rope_table_.data(), {max_positions_, rope}),
                   config_.rope_interleave});
  if (config_.rope_interleave) return;
  // Pages hold interleaved pairs. Scores need only the same order in query and key.
  rope_scratch_.resize(sz(rope));
  for (std::int64_t t = 0; t < n; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      float* row = view.row<float>(t, h);
      std::copy_n(row, rope, rope_scratch_.begin());
      for (std::int64_t j = 0; j < rope / 2; ++j) {
        row[2 * j] = rope_scratch_[sz(j)];
        row[2 * j + 1] = rope_scratch_[sz(j + rope / 2)];
      }
    }
  }
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
  ops::rms_norm(
      ops_, {TensorView::of(kv_.data(), {n, rank}).with_stride(0, rank + rope), w.kv_a_norm,
             static_cast<float>(config_.mla_norm_eps), TensorView::of(latent_.data(), {n, rank})});
  need(k_rope_, n * rope);
  for (std::int64_t t = 0; t < n; ++t) {
    std::copy_n(kv_.data() + t * (rank + rope) + rank, rope, k_rope_.data() + t * rope);
  }
  rotate(k_rope_.data(), n, 1, rope, rope, TensorView::of(step.positions.data(), {n}));
  ops::append_kv(
      ops_, {TensorView::of(latent_.data(), {n, rank}), TensorView::of(k_rope_.data(), {n, rope}),
             TensorView::of(step.slots.data(), {n}), cache_.layer(layer), scale_mode_});
}

void Forward::attention(const Step& step, std::int64_t layer) {
  const LayerWeights& w = weights_.layers[sz(layer)];
  const std::int64_t n = step.size(), heads = config_.num_attention_heads;
  query(w, n);
  rotate(q_.data() + config_.qk_nope_head_dim, n, heads, heads * config_.qk_head_dim(),
         config_.qk_head_dim(), TensorView::of(step.positions.data(), {n}));
  append(step, w, layer);
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
  const auto table = step.prefill->table();
  need(keys_latent_, keys * rank);
  need(keys_rope_, keys * rope);
  ops::fetch_dequant(ops_, {cache_.layer(layer),
                            TensorView::of(table.data(), {static_cast<std::int64_t>(table.size())}),
                            0, keys, TensorView::of(keys_latent_.data(), {keys, rank}),
                            TensorView::of(keys_rope_.data(), {keys, rope})});
  linear(keys_latent_, w.kv_b, keys, keys_expanded_);
  const std::int64_t per_head = nope + v_dim;
  const auto expanded = [&](std::int64_t offset, std::int64_t width) {
    return TensorView::of(keys_expanded_.data() + offset, {keys, heads, width})
        .with_stride(0, heads * per_head)
        .with_stride(1, per_head);
  };
  ops::mla_prefill(ops_, {TensorView::of(q_.data(), {n, heads, nope + rope}), expanded(0, nope),
                          TensorView::of(keys_rope_.data(), {keys, rope}), expanded(nope, v_dim),
                          step.begin, static_cast<float>(config_.softmax_scale()),
                          TensorView::of(need(attn_, n * heads * v_dim), {n, heads, v_dim})});
}

void Forward::decode_attention(const Step& step, std::int64_t layer) {
  const LayerWeights& w = weights_.layers[sz(layer)];
  const std::int64_t n = step.size(), heads = config_.num_attention_heads;
  const std::int64_t rank = config_.kv_lora_rank, rope = config_.qk_rope_head_dim;
  const std::int64_t nope = config_.qk_nope_head_dim, head_dim = nope + rope;
  const std::int64_t seqlen_q = step.seqlen_q, batch = n / seqlen_q;
  ops::head_linear(ops_,
                   {TensorView::of(q_.data(), {n, heads, nope})
                        .with_stride(0, heads * head_dim)
                        .with_stride(1, head_dim),
                    w.w_uk, TensorView::of(need(q_latent_, n * heads * rank), {n, heads, rank})});
  need(q_rope_, n * heads * rope);
  for (std::int64_t i = 0; i < n * heads; ++i) {
    std::copy_n(q_.data() + i * head_dim + nope, rope, q_rope_.data() + i * rope);
  }
  const auto view = [&](const auto* data, std::int64_t width) {
    return TensorView::of(data, {batch, seqlen_q, heads, width});
  };
  const auto used = [&](const std::vector<float>& v, std::int64_t width) {
    return std::span<const float>(v).first(sz(n * heads * width));
  };

  MlaDecodeArgs args;
  args.cache = cache_.layer(layer);
  if (cache_.format() == KvCacheFormat::kF32) {
    args.q_latent = view(q_latent_.data(), rank);
    args.q_rope = view(q_rope_.data(), rope);
  } else {
    // The absorbed query is a BF16 tensor on every backend, quantised or not.
    to_bf16(used(q_latent_, rank), q_low_precision_);
    to_bf16(used(q_rope_, rope), q_rope_low_precision_);
    args.q_latent = view(q_low_precision_.data(), rank);
    args.q_rope = view(q_rope_low_precision_.data(), rope);
  }
  if (cache_.format() == KvCacheFormat::kFp8) {
    q_codes_.resize(sz(n * heads * rank));
    std::vector<BFloat16>& rope_out = q_rope_low_precision_;
    std::vector<BFloat16> rope_in = rope_out;
    need(q_scale_, n * heads);
    QuantizeQArgs quantize{
        args.q_latent,
        view(rope_in.data(), rope),
        TensorView(q_codes_.data(), DType::kE4M3, {batch, seqlen_q, heads, rank}),
        view(rope_out.data(), rope),
        TensorView::of(q_scale_.data(), {batch, seqlen_q, heads}),
        scale_mode_};
    ops::quantize_q(ops_, quantize);
    args.q_latent = quantize.q_latent_out;
    args.q_rope = quantize.q_rope_out;
    args.q_scale = quantize.q_scale_out;
  }
  args.block_table = TensorView::of(step.tables.data(), {batch, step.max_pages});
  args.cache_seqlens = TensorView::of(step.seqlens.data(), {batch});
  args.softmax_scale = static_cast<float>(config_.softmax_scale());
  args.out = view(need(attn_latent_, n * heads * rank), rank);
  args.numerics = numerics_;
  ops::mla_decode(ops_, args);
  ops::head_linear(ops_, {TensorView::of(attn_latent_.data(), {n, heads, rank}), w.w_uv,
                          TensorView::of(need(attn_, n * heads * config_.v_head_dim),
                                         {n, heads, config_.v_head_dim})});
}

void Forward::dense_ffn(const ops::Weight& gate, const ops::Weight& up, const ops::Weight& down,
                        std::int64_t n) {
  linear(normed_, gate, n, gate_);
  linear(normed_, up, n, up_);
  const std::int64_t width = gate.out_features();
  const TensorView g = TensorView::of(gate_.data(), {n, width});
  ops::swiglu(ops_, {g, TensorView::of(up_.data(), {n, width}), g});
  linear(gate_, down, n, out_);
}

void Forward::moe_ffn(const LayerWeights& w, std::int64_t n) {
  const std::int64_t experts = config_.num_experts, top_k = config_.experts_per_token;
  linear(normed_, w.router, n, router_);
  if (router_ids_.size() < sz(n * top_k)) router_ids_.resize(sz(n * top_k));
  ops::MoeRouteArgs route;
  route.logits = TensorView::of(router_.data(), {n, experts});
  route.bias = w.router_bias;
  route.kind = static_cast<ops::RouterKind>(config_.routing);
  route.num_groups = static_cast<int>(config_.n_group);
  route.groups_kept = static_cast<int>(config_.topk_group);
  route.top_k = static_cast<int>(top_k);
  route.normalize = config_.norm_topk_prob;
  route.scaling_factor = static_cast<float>(config_.routed_scaling_factor);
  route.ids = TensorView::of(router_ids_.data(), {n, top_k});
  route.weights = TensorView::of(need(router_weights_, n * top_k), {n, top_k});
  ops::moe_route(ops_, route);
  if (config_.num_shared_experts > 0) {
    dense_ffn(w.shared_gate, w.shared_up, w.shared_down, n);
  } else {
    need(out_, n * config_.hidden_size);
    std::fill_n(out_.begin(), n * config_.hidden_size, 0.0f);
  }
  ops::moe_ffn(ops_,
               {TensorView::of(normed_.data(), {n, config_.hidden_size}), route.ids, route.weights,
                &w.experts, TensorView::of(out_.data(), {n, config_.hidden_size})});
}

void Forward::ffn(const LayerWeights& w, std::int64_t n) {
  if (w.experts.empty()) {
    dense_ffn(w.gate, w.up, w.down, n);
  } else {
    moe_ffn(w, n);
  }
}

void Forward::logits(std::span<const float> hidden, std::vector<float>& out) {
  const std::int64_t rows = static_cast<std::int64_t>(hidden.size()) / config_.hidden_size;
  out.resize(sz(rows * config_.vocab_size));
  ops::linear(ops_, {TensorView::of(hidden.data(), {rows, config_.hidden_size}), weights_.lm_head,
                     TensorView::of(out.data(), {rows, config_.vocab_size})});
}

}  // namespace snapmla::model
