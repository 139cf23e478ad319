// What config.json of a DeepSeek-V2/V3-family checkpoint says, checked and with defaults filled in.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace snapmla {

enum class RoutingKind : std::uint8_t {
  kGreedySoftmax,
  kGroupLimitedGreedySoftmax,
  kNoAuxTcSigmoid
};

// YaRN parameters (rope_type "yarn"). factor 1 and no other field: plain RoPE.
struct RopeScaling {
  double factor = 1.0;
  double beta_fast = 32.0, beta_slow = 1.0;
  double mscale = 1.0, mscale_all_dim = 0.0;
  std::int64_t original_max_position_embeddings = 4096;
};

struct ModelConfig {
  std::string model_type;    // deepseek_v2 | deepseek_v3 | kimi_k2
  std::string architecture;  // DeepseekV2ForCausalLM | DeepseekV3ForCausalLM
  std::int64_t hidden_size = 0, num_hidden_layers = 0, num_attention_heads = 0, vocab_size = 0;
  std::int64_t intermediate_size = 0, max_position_embeddings = 0;
  std::optional<std::int64_t> q_lora_rank;  // empty: one q_proj
  std::int64_t kv_lora_rank = 512, qk_rope_head_dim = 64, qk_nope_head_dim = 0, v_head_dim = 0;
  double rms_norm_eps = 1e-6, mla_norm_eps = 1e-6;  // q_a / kv_a layernorm: 1e-6 as HF
  double rope_theta = 10000.0;
  std::optional<RopeScaling> yarn;
  bool rope_interleave = true;
  bool tie_word_embeddings = false;

  // Mixture of experts; num_experts 0: every layer is dense.
  std::int64_t num_experts = 0, num_shared_experts = 0, experts_per_token = 0;
  std::int64_t moe_intermediate_size = 0, first_k_dense_replace = 0, moe_layer_freq = 1;
  std::int64_t n_group = 1, topk_group = 1;
  RoutingKind routing = RoutingKind::kNoAuxTcSigmoid;
  bool norm_topk_prob = true;
  double routed_scaling_factor = 1.0;

  std::int64_t num_nextn_predict_layers = 0;
  bool fp8_weights = false;  // quantization_config fp8, 128 x 128 blocks
  std::vector<std::int64_t> eos_token_ids;
  std::optional<std::int64_t> bos_token_id;

  std::int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  bool is_moe_layer(std::int64_t layer) const {
    return num_experts > 0 && layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
  }
  // (nope + rope)^-0.5 times the YaRN factor squared (0.1 * mscale_all_dim * ln(factor) + 1)^2.
  double softmax_scale() const;
};

}  // namespace snapmla
