#include "model/config.h"

#include <cmath>
#include <set>

#include "base/check.h"
#include "model/json.h"

namespace snapmla {

double ModelConfig::softmax_scale() const {
  double factor = 1.0;
  if (yarn && yarn->factor > 1.0 && yarn->mscale_all_dim != 0.0) {
    factor = 0.1 * yarn->mscale_all_dim * std::log(yarn->factor) + 1.0;
  }
  return factor * factor / std::sqrt(static_cast<double>(qk_head_dim()));
}

namespace model {
namespace {

[[noreturn]] void unsupported(const std::string& file, const std::string& what) {
  throw Error(ErrorCode::kUnsupported, file + ": " + what);
}

void read_rope(const JsonObject& json, const std::string& file, ModelConfig& c) {
  c.rope_theta = json.number_or("rope_theta", 2.0, 1e12, 10000.0);
  const bool fresh = json.has("rope_parameters");  // transformers 5; before that: rope_scaling
  if (!fresh && !json.has("rope_scaling")) return;
  const JsonObject rope = json.object(fresh ? "rope_parameters" : "rope_scaling");
  c.rope_theta = rope.number_or("rope_theta", 2.0, 1e12, c.rope_theta);
  const std::string type = rope.string_or("rope_type", rope.string_or("type", "default"));
  if (type == "default") return;
  if (type != "yarn")
    unsupported(file, "rope_type: got '" + type + "', accepted are default and yarn");
  if (rope.has("attention_factor"))
    unsupported(file, "attention_factor: accepted is none, the factor follows from mscale");
  if (!rope.boolean_or("truncate", true))
    unsupported(file, "truncate: got false, accepted is true");
  RopeScaling yarn;
  yarn.factor = rope.number("factor", 1.0, 1e4);
  yarn.beta_fast = rope.number_or("beta_fast", 1e-3, 1e6, 32.0);
  yarn.beta_slow = rope.number_or("beta_slow", 1e-3, 1e6, 1.0);
  yarn.mscale = rope.number_or("mscale", 0.0, 100.0, 0.0);  // 0: not given
  yarn.mscale_all_dim = rope.number_or("mscale_all_dim", 0.0, 100.0, 0.0);
  yarn.original_max_position_embeddings =
      rope.integer_or("original_max_position_embeddings", 1, std::int64_t{1} << 31, 4096);
  c.yarn = yarn;
}

RoutingKind routing(const JsonObject& json, const std::string& file, bool v2) {
  const std::string method = json.string_or("topk_method", v2 ? "greedy" : "noaux_tc");
  const std::string scoring = json.string_or("scoring_func", v2 ? "softmax" : "sigmoid");
  if (method == "greedy" && scoring == "softmax") return RoutingKind::kGreedySoftmax;
  if (method == "group_limited_greedy" && scoring == "softmax")
    return RoutingKind::kGroupLimitedGreedySoftmax;
  if (method == "noaux_tc" && scoring == "sigmoid") return RoutingKind::kNoAuxTcSigmoid;
  unsupported(
      file,
      "topk_method and scoring_func: got '" + method + "' with '" + scoring +
          "', accepted are greedy or group_limited_greedy with softmax, noaux_tc with sigmoid");
}

void read_moe(const JsonObject& json, const std::string& file, bool v2, ModelConfig& c) {
  c.first_k_dense_replace = json.integer_or("first_k_dense_replace", 0, 100000, 0);
  if (!json.has("n_routed_experts") || c.first_k_dense_replace >= c.num_hidden_layers) return;
  c.num_experts = json.integer("n_routed_experts", 0, 65536);
  if (c.num_experts == 0) return;
  c.num_shared_experts = json.integer_or("n_shared_experts", 0, 1024, 0);
  c.moe_intermediate_size = json.integer("moe_intermediate_size", 1, 1 << 20);
  c.moe_layer_freq = json.integer_or("moe_layer_freq", 1, 100000, 1);
  c.n_group = json.integer_or("n_group", 1, c.num_experts, 1);
  c.topk_group = json.integer_or("topk_group", 1, c.n_group, 1);
  if (c.num_experts % c.n_group != 0)
    json.refuse("n_group", str("a divisor of n_routed_experts ", c.num_experts));
  c.routing = routing(json, file, v2);
  // Without group limits all groups are open.
  if (c.routing == RoutingKind::kGreedySoftmax) c.n_group = c.topk_group = 1;
  c.experts_per_token =
      json.integer("num_experts_per_tok", 1, c.num_experts / c.n_group * c.topk_group);
  c.norm_topk_prob = json.boolean_or("norm_topk_prob", !v2);
  c.routed_scaling_factor = json.number_or("routed_scaling_factor", 0.0, 1e6, 1.0);
}

void read_quantization(const JsonObject& json, const std::string& file, ModelConfig& c) {
  if (!json.has("quantization_config")) return;
  const JsonObject q = json.object("quantization_config");
  const std::string method = q.string_or("quant_method", "");
  if (method != "fp8")
    unsupported(file, "quantization_config.quant_method: got '" + method + "', accepted is fp8");
  if (q.raw("weight_block_size") != nlohmann::json::array({128, 128}))
    q.refuse("weight_block_size", "[128, 128]");
  c.fp8_weights = true;
}

void read_tokens(const JsonObject& json, ModelConfig& c) {
  if (json.has("bos_token_id")) c.bos_token_id = json.integer("bos_token_id", 0, c.vocab_size - 1);
  if (!json.has("eos_token_id")) return;
  const nlohmann::json& eos = json.raw("eos_token_id");
  for (const nlohmann::json& id : eos.is_array() ? eos : nlohmann::json::array({eos})) {
    if (!id.is_number_integer() || id < 0 || id >= c.vocab_size) {
      json.refuse("eos_token_id", "an id or a list of ids below vocab_size");
    }
    c.eos_token_ids.push_back(id.get<std::int64_t>());
  }
}

}  // namespace

ModelConfig parse_config(std::string_view text, const std::string& file) {
  const nlohmann::json value = parse_json(text, file);
  const JsonObject json(value, file);
  ModelConfig c;
  c.model_type = json.string("model_type");
  static const std::set<std::string> known = {"deepseek_v2", "deepseek_v3", "kimi_k2"};
  if (!known.contains(c.model_type)) {
    unsupported(file, "model_type: got '" + c.model_type +
                          "', accepted are deepseek_v2, deepseek_v3 and kimi_k2");
  }
  for (const char* key : {"index_topk", "index_n_heads", "indexer"}) {
    if (json.has(key))
      unsupported(file, std::string(key) + ": sparse attention (DSA) is another model");
  }
  const bool v2 = c.model_type == "deepseek_v2";
  c.architecture = v2 ? "DeepseekV2ForCausalLM" : "DeepseekV3ForCausalLM";
  if (json.string_or("hidden_act", "silu") != "silu")
    unsupported(file, "hidden_act: accepted is silu");
  if (json.boolean_or("attention_bias", false))
    unsupported(file, "attention_bias: accepted is false");

  c.hidden_size = json.integer("hidden_size", 1, 1 << 20);
  c.num_hidden_layers = json.integer("num_hidden_layers", 1, 1000);
  c.num_attention_heads = json.integer("num_attention_heads", 1, 128);
  c.vocab_size = json.integer("vocab_size", 1, 1 << 24);
  c.intermediate_size = json.integer("intermediate_size", 1, 1 << 22);
  c.max_position_embeddings = json.integer_or("max_position_embeddings", 1, 1 << 22, 4096);
  if (json.has("q_lora_rank")) c.q_lora_rank = json.integer("q_lora_rank", 1, 1 << 20);
  c.kv_lora_rank = json.integer_or("kv_lora_rank", 512, 512, 512);
  c.qk_rope_head_dim = json.integer_or("qk_rope_head_dim", 64, 64, 64);
  c.qk_nope_head_dim = json.integer("qk_nope_head_dim", 1, 1 << 16);
  c.v_head_dim = json.integer("v_head_dim", 1, 1 << 16);
  c.rms_norm_eps = json.number_or("rms_norm_eps", 1e-12, 1.0, 1e-6);
  c.rope_interleave = json.boolean_or("rope_interleave", true);
  c.tie_word_embeddings = json.boolean_or("tie_word_embeddings", false);
  c.num_nextn_predict_layers = json.integer_or("num_nextn_predict_layers", 0, 8, 0);
  read_rope(json, file, c);
  read_moe(json, file, v2, c);
  read_quantization(json, file, c);
  read_tokens(json, c);
  return c;
}

ModelConfig load_config(const std::filesystem::path& model_dir) {
  const std::filesystem::path path = model_dir / "config.json";
  return parse_config(read_text(path, 16 << 20), path.string());
}

}  // namespace model
}  // namespace snapmla
