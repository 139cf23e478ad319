#include "model/weights.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string>

#include "base/check.h"
#include "ops/element.h"

namespace snapmla::model {
namespace {

class Loader {
 public:
  Loader(const Checkpoint& checkpoint, const ModelConfig& config)
      : checkpoint_(checkpoint), c_(config) {}

  TensorView vector(const std::string& name, std::int64_t width) {
    return tensor(name, {width}, false);
  }

  ops::Weight matrix(const std::string& prefix, std::int64_t out, std::int64_t in) {
    ops::Weight w;
    w.data = tensor(prefix + ".weight", {out, in}, c_.fp8_weights);
    if (w.data.dtype() == DType::kE4M3) {
      w.scale_inv =
          tensor(prefix + ".weight_scale_inv", {(out + 127) / 128, (in + 127) / 128}, false);
      if (w.scale_inv.dtype() != DType::kF32)
        refuse(prefix + ".weight_scale_inv", to_string(w.scale_inv.dtype()), "f32");
    }
    return w;
  }

  LayerWeights layer(std::int64_t index, ModelWeights& model) {
    const std::string p = "model.layers." + std::to_string(index) + ".";
    LayerWeights w;
    w.attn_norm = vector(p + "input_layernorm.weight", c_.hidden_size);
    w.ffn_norm = vector(p + "post_attention_layernorm.weight", c_.hidden_size);
    attention(p + "self_attn.", w);
    split_kv_b(w, model);
    if (c_.is_moe_layer(index)) {
      moe(p + "mlp.", w, model);
    } else {
      dense(p + "mlp.", c_.intermediate_size, w.gate, w.up, w.down);
    }
    return w;
  }

  // Layer num_hidden_layers, with its own projections of the embedding and the hidden state.
  std::optional<MtpWeights> mtp(ModelWeights& model) {
    const std::string p = "model.layers." + std::to_string(c_.num_hidden_layers) + ".";
    if (c_.num_nextn_predict_layers == 0 || !checkpoint_.has(p + "eh_proj.weight"))
      return std::nullopt;
    MtpWeights w;
    w.enorm = vector(p + "enorm.weight", c_.hidden_size);
    w.hnorm = vector(p + "hnorm.weight", c_.hidden_size);
    w.eh_proj = matrix(p + "eh_proj", c_.hidden_size, 2 * c_.hidden_size);
    w.head_norm = vector(p + "shared_head.norm.weight", c_.hidden_size);
    w.block = layer(c_.num_hidden_layers, model);
    return w;
  }

  // A config that promises more than the files hold is refused before anything is allocated for it.
  void check_bytes() {
    const auto d = static_cast<double>(c_.hidden_size),
               h = static_cast<double>(c_.num_attention_heads);
    const auto rank = static_cast<double>(c_.kv_lora_rank);
    const auto nope = static_cast<double>(c_.qk_nope_head_dim),
               v = static_cast<double>(c_.v_head_dim);
    // One byte per element is the least that any accepted type takes.
    double bytes =
        2.0 * d * static_cast<double>(c_.vocab_size) * (c_.tie_word_embeddings ? 0.5 : 1.0);
    for (std::int64_t i = 0; i < c_.num_hidden_layers; ++i) {
      bytes += h * rank * (nope + v) + d * h * v;
      bytes += c_.is_moe_layer(i) ? 3.0 * d * static_cast<double>(c_.num_experts) *
                                        static_cast<double>(c_.moe_intermediate_size)
                                  : 3.0 * d * static_cast<double>(c_.intermediate_size);
    }
    if (bytes > static_cast<double>(checkpoint_.total_bytes())) {
      throw Error(ErrorCode::kInvalidFile,
                  str(checkpoint_.directory(), ": weights: got ", checkpoint_.total_bytes(),
                      " bytes, accepted for this config.json are at least ", bytes));
    }
  }

 private:
  [[noreturn]] void refuse(const std::string& name, const std::string& got,
                           const std::string& accepted) {
    throw Error(ErrorCode::kInvalidFile, str(checkpoint_.directory(), ": tensor '", name, "': got ",
                                             got, ", accepted is ", accepted));
  }

  TensorView tensor(const std::string& name, std::initializer_list<std::int64_t> shape,
                    bool may_be_fp8) {
    const TensorView t = checkpoint_.get(name);
    std::string got = "[", want = "[";
    bool ok = t.rank() == static_cast<int>(shape.size());
    int d = 0;
    for (std::int64_t extent : shape) {
      want += (d ? ", " : "") + std::to_string(extent);
      ok = ok && t.dim(d) == extent;
      ++d;
    }
    for (int i = 0; i < t.rank(); ++i) got += (i ? ", " : "") + std::to_string(t.dim(i));
    if (!ok) refuse(name, "shape " + got + "]", want + "]");
    const bool fits = t.dtype() == DType::kF32 || t.dtype() == DType::kBF16 ||
                      (may_be_fp8 && t.dtype() == DType::kE4M3);
    if (!fits) refuse(name, to_string(t.dtype()), may_be_fp8 ? "f32, bf16 or e4m3" : "f32 or bf16");
    // Loads go through typed pointers: a file whose header is not padded must not make them
    // misaligned.
    if (reinterpret_cast<std::uintptr_t>(t.raw()) % size_of(t.dtype()) != 0) {
      refuse(name, "data that is not aligned to its element size",
             "a header padded as safetensors pads it");
    }
    return t;
  }

  void attention(const std::string& p, LayerWeights& w) {
    const std::int64_t heads = c_.num_attention_heads, hidden = c_.hidden_size;
    if (c_.q_lora_rank) {
      w.q_a = matrix(p + "q_a_proj", *c_.q_lora_rank, hidden);
      w.q_a_norm = vector(p + "q_a_layernorm.weight", *c_.q_lora_rank);
      w.q_b = matrix(p + "q_b_proj", heads * c_.qk_head_dim(), *c_.q_lora_rank);
    } else {
      w.q_proj = matrix(p + "q_proj", heads * c_.qk_head_dim(), hidden);
    }
    w.kv_a = matrix(p + "kv_a_proj_with_mqa", c_.kv_lora_rank + c_.qk_rope_head_dim, hidden);
    w.kv_a_norm = vector(p + "kv_a_layernorm.weight", c_.kv_lora_rank);
    w.kv_b =
        matrix(p + "kv_b_proj", heads * (c_.qk_nope_head_dim + c_.v_head_dim), c_.kv_lora_rank);
    w.o_proj = matrix(p + "o_proj", hidden, heads * c_.v_head_dim);
  }

  // Per head: nope rows of W_UK, then v rows of W_UV. Dequantised before it is split, since head
  // boundaries need not fall on 128-blocks; W_UK is transposed so that the absorbed query is a
  // plain product.
  void split_kv_b(LayerWeights& w, ModelWeights& model) {
    const std::int64_t heads = c_.num_attention_heads, rank = c_.kv_lora_rank;
    const std::int64_t nope = c_.qk_nope_head_dim, v = c_.v_head_dim;
    float* uk = make(heads * rank * nope, model);
    float* uv = make(heads * rank * v, model);
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t k = 0; k < rank; ++k) {
        for (std::int64_t i = 0; i < nope; ++i) {
          uk[(h * rank + k) * nope + i] = ops::weight_at(w.kv_b, h * (nope + v) + i, k);
        }
        for (std::int64_t i = 0; i < v; ++i) {
          uv[(h * v + i) * rank + k] = ops::weight_at(w.kv_b, h * (nope + v) + nope + i, k);
        }
      }
    }
    w.w_uk = TensorView::of(uk, {heads, rank, nope});
    w.w_uv = TensorView::of(uv, {heads, v, rank});
  }

  float* make(std::int64_t n, ModelWeights& model) {
    model.made.push_back(std::make_unique<float[]>(static_cast<std::size_t>(n)));
    return model.made.back().get();
  }

  void dense(const std::string& p, std::int64_t inner, ops::Weight& gate, ops::Weight& up,
             ops::Weight& down) {
    gate = matrix(p + "gate_proj", inner, c_.hidden_size);
    up = matrix(p + "up_proj", inner, c_.hidden_size);
    down = matrix(p + "down_proj", c_.hidden_size, inner);
  }

  void moe(const std::string& p, LayerWeights& w, ModelWeights& model) {
    w.router.data = tensor(p + "gate.weight", {c_.num_experts, c_.hidden_size}, false);
    const std::string bias = p + "gate.e_score_correction_bias";
    if (c_.routing == RoutingKind::kNoAuxTcSigmoid && checkpoint_.has(bias)) {
      const TensorView stored = vector(bias, c_.num_experts);
      float* values = make(c_.num_experts, model);
      for (std::int64_t e = 0; e < c_.num_experts; ++e)
        values[e] = ops::load(stored.raw(), stored.dtype(), e);
      w.router_bias = TensorView::of(values, {c_.num_experts});
    }
    const std::int64_t inner = c_.moe_intermediate_size;
    w.experts.resize(static_cast<std::size_t>(c_.num_experts));
    if (checkpoint_.has(p + "experts.gate_up_proj")) {
      fused_experts(p, inner, w);
    } else {
      for (std::int64_t e = 0; e < c_.num_experts; ++e) {
        ops::ExpertWeights& x = w.experts[static_cast<std::size_t>(e)];
        dense(p + "experts." + std::to_string(e) + ".", inner, x.gate, x.up, x.down);
      }
    }
    if (c_.num_shared_experts > 0) {
      dense(p + "shared_experts.", inner * c_.num_shared_experts, w.shared_gate, w.shared_up,
            w.shared_down);
    }
  }

  // transformers 5 keeps experts in one tensor: gate_up_proj [E, 2 Im, D], down_proj [E, D, Im].
  void fused_experts(const std::string& p, std::int64_t inner, LayerWeights& w) {
    const std::int64_t hidden = c_.hidden_size;
    const TensorView gate_up =
        tensor(p + "experts.gate_up_proj", {c_.num_experts, 2 * inner, hidden}, false);
    const TensorView down = tensor(p + "experts.down_proj", {c_.num_experts, hidden, inner}, false);
    for (std::int64_t e = 0; e < c_.num_experts; ++e) {
      ops::ExpertWeights& x = w.experts[static_cast<std::size_t>(e)];
      const std::int64_t at = e * gate_up.stride(0);
      x.gate.data = TensorView(ops::element_ptr(gate_up, at), gate_up.dtype(), {inner, hidden});
      x.up.data = TensorView(ops::element_ptr(gate_up, at + inner * hidden), gate_up.dtype(),
                             {inner, hidden});
      x.down.data =
          TensorView(ops::element_ptr(down, e * down.stride(0)), down.dtype(), {hidden, inner});
    }
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& c_;
};

// Brings mapped weights into memory and counts what it went through.
class Prefetcher {
 public:
  Prefetcher(const Checkpoint& checkpoint, const LoadProgress& on_progress)
      : checkpoint_(checkpoint), on_progress_(on_progress) {
    const double memory =
        static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
    touches_ = static_cast<double>(checkpoint.total_bytes()) < 0.9 * memory;
  }

  // Every tensor whose name starts with `prefix`.
  void fetch(const std::string& prefix) {
    const auto& tensors = checkpoint_.tensors();
    for (auto it = tensors.lower_bound(prefix);
         it != tensors.end() && it->first.starts_with(prefix); ++it) {
      fetch(it->second);
    }
  }

  void report(std::int64_t bytes) {
    if (on_progress_) on_progress_(bytes, checkpoint_.total_bytes());
  }

 private:
  static constexpr std::int64_t kStep = 16 << 20;  // bytes between two reports

  void fetch(const TensorView& t) {
    const auto* bytes = static_cast<const volatile std::uint8_t*>(t.raw());
    const std::int64_t size = t.numel() * static_cast<std::int64_t>(size_of(t.dtype()));
    for (std::int64_t begin = 0; begin < size; begin += kStep) {
      const std::int64_t end = std::min(size, begin + kStep);
      if (touches_) touch(bytes + begin, end - begin);
      done_ += end - begin;
      report(done_);
    }
  }

  // One system call for many pages where the kernel has it (Linux 5.14), else, or when a page is
  // missing because the file was cut short, one read per page.
  void touch(const volatile std::uint8_t* bytes, std::int64_t size) const {
#ifdef MADV_POPULATE_READ
    const auto first = reinterpret_cast<std::uintptr_t>(bytes) & ~(page_ - 1);
    const auto last = reinterpret_cast<std::uintptr_t>(bytes) + static_cast<std::uintptr_t>(size);
    if (madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_READ) == 0) return;
#endif
    for (std::int64_t at = 0; at < size; at += static_cast<std::int64_t>(page_)) (void)bytes[at];
  }

  const Checkpoint& checkpoint_;
  const LoadProgress& on_progress_;
  const std::uintptr_t page_ = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  bool touches_ = true;
  std::int64_t done_ = 0;
};

}  // namespace

ModelWeights load_weights(const Checkpoint& checkpoint, const ModelConfig& config,
                          const LoadProgress& on_progress) {
  Loader loader(checkpoint, config);
  checkpoint.check_files();
  loader.check_bytes();
  Prefetcher prefetcher(checkpoint, on_progress);
  prefetcher.fetch("model.embed_tokens.");
  prefetcher.fetch("lm_head.");
  ModelWeights model;
  ops::Weight embed;
  embed.data = checkpoint.get("model.embed_tokens.weight");
  if (embed.data.rank() != 2 || embed.data.dim(0) != config.vocab_size ||
      embed.data.dim(1) != config.hidden_size) {
    throw Error(ErrorCode::kInvalidFile,
                str(checkpoint.directory(), ": tensor 'model.embed_tokens.weight': accepted is [",
                    config.vocab_size, ", ", config.hidden_size, "]"));
  }
  model.embed = embed.data;
  model.final_norm = loader.vector("model.norm.weight", config.hidden_size);
  model.lm_head = config.tie_word_embeddings
                      ? embed
                      : loader.matrix("lm_head", config.vocab_size, config.hidden_size);
  for (std::int64_t i = 0; i < config.num_hidden_layers; ++i) {
    prefetcher.fetch("model.layers." + std::to_string(i) + ".");
    model.layers.push_back(loader.layer(i, model));
  }
  model.mtp = loader.mtp(model);
  prefetcher.report(checkpoint.total_bytes());
  checkpoint.check_files();
  return model;
}

namespace {

template <class Fn>
void for_each_tensor(ops::Weight& w, Fn&& fn) {
  fn(w.data);
  fn(w.scale_inv);
}

template <class Fn>
void for_each_tensor(LayerWeights& w, Fn&& fn) {
  for (TensorView* t :
       {&w.attn_norm, &w.ffn_norm, &w.q_a_norm, &w.kv_a_norm, &w.w_uk, &w.w_uv, &w.router_bias}) {
    fn(*t);
  }
  for (ops::Weight* m : {&w.q_proj, &w.q_a, &w.q_b, &w.kv_a, &w.kv_b, &w.o_proj, &w.gate, &w.up,
                         &w.down, &w.router, &w.shared_gate, &w.shared_up, &w.shared_down}) {
    for_each_tensor(*m, fn);
  }
  for (ops::ExpertWeights& e : w.experts) {
    for (ops::Weight* m : {&e.gate, &e.up, &e.down}) for_each_tensor(*m, fn);
  }
}

// Absent tensors are null views; they are left out.
template <class Fn>
void for_each_tensor(ModelWeights& w, Fn&& fn) {
  const auto present = [&fn](TensorView& t) {
    if (t.raw()) fn(t);
  };
  present(w.embed);
  present(w.final_norm);
  for_each_tensor(w.lm_head, present);
  for (LayerWeights& layer : w.layers) for_each_tensor(layer, present);
}

std::int64_t bytes_of(const TensorView& t) {
  return t.numel() * static_cast<std::int64_t>(size_of(t.dtype()));
}

}  // namespace

void place_weights(ModelWeights& weights, Memory& memory, const LoadProgress& on_progress) {
  if (memory.host_accessible()) return;
  constexpr std::int64_t kAlignment = 256;
  std::map<const void*, std::int64_t> offsets;  // a tied embedding is one tensor with two views
  std::int64_t total = 0;
  for_each_tensor(weights, [&](TensorView& t) {
    if (!offsets.emplace(t.raw(), total).second) return;
    total += (bytes_of(t) + kAlignment - 1) / kAlignment * kAlignment;
  });
  try {
    weights.placed = Buffer(memory, total);
  } catch (const Error& e) {
    throw Error(e.code(), str("weights: ", e.what()));
  }
  auto* base = static_cast<std::uint8_t*>(weights.placed.data());
  std::set<std::int64_t> done;
  for_each_tensor(weights, [&](TensorView& t) {
    const std::int64_t offset = offsets.at(t.raw());
    if (done.insert(offset).second) {
      memory.upload(base + offset, t.raw(), bytes_of(t));
      if (on_progress) on_progress(offset + bytes_of(t), total);
    }
    t = t.with_data(base + offset);
  });
  weights.made.clear();
  if (on_progress) on_progress(total, total);
}

}  // namespace snapmla::model
