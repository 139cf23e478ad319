#include "support/random_checkpoint.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <vector>

namespace snapmla::oracle {
namespace {

class Writer {
 public:
  explicit Writer(unsigned seed) : rng_(seed) {}

  template <class... T>
  int pick(T... options) {
    const int values[] = {options...};
    return values[rng_() % sizeof...(options)];
  }
  double uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(rng_() % 1000003) / 1000003.0;
  }
  double normal(double deviation) {  // sum of twelve: near enough, and the same everywhere
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform(0, 1);
    return deviation * sum;
  }

  void matrix(const std::string& name, int out, int in, const std::string& type, double deviation) {
    std::string bytes;
    for (int i = 0; i < out * in; ++i) {
      if (type == "F8_E4M3") {
        const int code = static_cast<int>(rng_() % 0x70u);  // up to 240, either sign
        bytes.push_back(static_cast<char>(rng_() % 2 ? code : code | 0x80));
      } else {
        put(bytes, static_cast<float>(normal(deviation)), type == "BF16" ? 2 : 4);
      }
    }
    add(name, {out, in}, type, bytes);
    if (type != "F8_E4M3") return;
    std::string scales;  // codes are 38 on average (root mean square)
    for (int i = 0; i < (out + 127) / 128 * ((in + 127) / 128); ++i)
      put(scales, static_cast<float>(uniform(0.5, 1.5) * deviation / 38), 4);
    add(name + "_scale_inv", {(out + 127) / 128, (in + 127) / 128}, "F32", scales);
  }
  void vector(const std::string& name, int n, double low, double high) {
    std::string bytes;
    for (int i = 0; i < n; ++i) put(bytes, static_cast<float>(uniform(low, high)), 4);
    add(name, {n}, "F32", bytes);
  }
  void write(const std::filesystem::path& path) const {
    std::string header = header_.dump();
    header.resize((header.size() + 7) / 8 * 8, ' ');
    const std::uint64_t size = header.size();
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&size), 8);
    out << header << data_;
  }

 private:
  static void put(std::string& bytes, float value, std::size_t size) {
    char raw[4];
    std::memcpy(raw, &value, 4);
    bytes.append(raw + 4 - size, size);
  }
  void add(const std::string& name, std::vector<int> shape, const std::string& type,
           const std::string& bytes) {
    header_[name] = {{"dtype", type},
                     {"shape", shape},
                     {"data_offsets", {data_.size(), data_.size() + bytes.size()}}};
    data_ += bytes;
  }

  std::mt19937 rng_;
  nlohmann::json header_;
  std::string data_;
};

}  // namespace

std::string write_random_checkpoint(unsigned seed, const std::filesystem::path& dir) {
  Writer w(seed);
  const bool v2 = w.pick(0, 1) == 1, tied = w.pick(0, 0, 1) == 1, lora = w.pick(0, 1) == 1;
  const int hidden = w.pick(24, 40, 64), heads = w.pick(1, 2, 3, 5), nope = w.pick(8, 16, 30);
  const int v_dim = w.pick(8, 12, 32), q_lora = w.pick(16, 24), vocab = w.pick(40, 96);
  const int groups = w.pick(1, 2, 4), experts = groups * w.pick(2, 3), kept = w.pick(1, groups);
  const int top_k = std::min(w.pick(1, 2, 3), experts / groups * kept), shared = w.pick(0, 1, 2);
  const int layers = 3, inner = 20, dense_inner = 48, first = w.pick(0, 1, 3);
  const std::string type =
      std::vector<std::string>{"F32", "BF16", "F8_E4M3"}[static_cast<std::size_t>(w.pick(0, 1, 2))];
  const std::string plain = type == "F8_E4M3" ? "BF16" : type;
  const bool greedy = v2 && w.pick(0, 1) == 1;

  nlohmann::json c = {{"model_type", v2 ? "deepseek_v2" : "deepseek_v3"},
                      {"hidden_size", hidden},
                      {"num_attention_heads", heads},
                      {"num_hidden_layers", layers},
                      {"vocab_size", vocab},
                      {"intermediate_size", dense_inner},
                      {"moe_intermediate_size", inner},
                      {"n_routed_experts", experts},
                      {"num_experts_per_tok", top_k},
                      {"n_shared_experts", shared},
                      {"first_k_dense_replace", first},
                      {"moe_layer_freq", w.pick(1, 1, 2)},
                      {"kv_lora_rank", 512},
                      {"q_lora_rank", nullptr},
                      {"qk_rope_head_dim", 64},
                      {"qk_nope_head_dim", nope},
                      {"v_head_dim", v_dim},
                      {"rms_norm_eps", w.pick(0, 1) ? 1e-5 : 1e-6},
                      {"max_position_embeddings", 4096},
                      {"tie_word_embeddings", tied},
                      {"n_group", groups},
                      {"topk_group", kept},
                      {"norm_topk_prob", w.pick(0, 1) == 1},
                      {"routed_scaling_factor", w.pick(0, 1) ? 2.5 : 1.0},
                      {"topk_method", greedy ? "greedy"
                                      : v2   ? "group_limited_greedy"
                                             : "noaux_tc"},
                      {"scoring_func", v2 ? "softmax" : "sigmoid"},
                      {"eos_token_id", 1}};
  if (lora) c["q_lora_rank"] = q_lora;
  if (!v2) c["rope_interleave"] = w.pick(0, 1) == 1;
  nlohmann::json rope = {{"type", "yarn"},
                         {"factor", w.pick(4, 40)},
                         {"beta_fast", 32},
                         {"beta_slow", 1},
                         {"original_max_position_embeddings", w.pick(64, 4096)}};
  const int mscale = w.pick(0, 1, 2);  // not given; both; only the one for the softmax
  if (mscale > 0) rope["mscale_all_dim"] = 0.707;
  if (mscale == 1) rope["mscale"] = 1.0;
  const int spelling = w.pick(0, 1, 2);
  if (spelling == 0) c["rope_theta"] = 10000;
  if (spelling == 1) c["rope_theta"] = 5000, c["rope_scaling"] = rope;
  if (spelling == 2) {
    rope["rope_type"] = "yarn";
    rope["rope_theta"] = 20000.0;
    rope.erase("type");
    c["rope_parameters"] = rope;
  }
  if (type == "F8_E4M3")
    c["quantization_config"] = {{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}};

  const auto linear = [&](const std::string& name, int out, int in) {
    w.matrix(name + ".weight", out, in, type, 1 / std::sqrt(in));
  };
  const auto ffn = [&](const std::string& p, int width) {
    linear(p + "gate_proj", width, hidden);
    linear(p + "up_proj", width, hidden);
    linear(p + "down_proj", hidden, width);
  };
  w.matrix("model.embed_tokens.weight", vocab, hidden, plain, 1);
  if (!tied) w.matrix("lm_head.weight", vocab, hidden, plain, 3 / std::sqrt(hidden));
  w.vector("model.norm.weight", hidden, 0.5, 1.5);
  for (int layer = 0; layer < layers; ++layer) {
    const std::string p = "model.layers." + std::to_string(layer) + ".", a = p + "self_attn.";
    w.vector(p + "input_layernorm.weight", hidden, 0.5, 1.5);
    w.vector(p + "post_attention_layernorm.weight", hidden, 0.5, 1.5);
    if (lora) {
      linear(a + "q_a_proj", q_lora, hidden);
      w.vector(a + "q_a_layernorm.weight", q_lora, 0.5, 1.5);
      linear(a + "q_b_proj", heads * (nope + 64), q_lora);
    } else {
      linear(a + "q_proj", heads * (nope + 64), hidden);
    }
    linear(a + "kv_a_proj_with_mqa", 576, hidden);
    w.vector(a + "kv_a_layernorm.weight", 512, 0.5, 1.5);
    linear(a + "kv_b_proj", heads * (nope + v_dim), 512);
    linear(a + "o_proj", hidden, heads * v_dim);
    if (layer < first || layer % c["moe_layer_freq"].get<int>() != 0) {
      ffn(p + "mlp.", dense_inner);
      continue;
    }
    w.matrix(p + "mlp.gate.weight", experts, hidden, plain, 2 / std::sqrt(hidden));
    if (!v2) w.vector(p + "mlp.gate.e_score_correction_bias", experts, -0.3, 0.3);
    for (int e = 0; e < experts; ++e) ffn(p + "mlp.experts." + std::to_string(e) + ".", inner);
    if (shared > 0) ffn(p + "mlp.shared_experts.", inner * shared);
  }
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "config.json") << c.dump();
  w.write(dir / "model.safetensors");
  return c.dump();
}

}  // namespace snapmla::oracle
