// config.json in both spellings, its defaults and its refusals.
#include "model/config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "model/checkpoint_files.h"
#include "snapmla/error.h"

namespace snapmla::model {
namespace {

using nlohmann::json;

json v3() {
  return json::parse(R"({
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168,
    "num_hidden_layers": 61, "num_attention_heads": 128, "vocab_size": 129280,
    "intermediate_size": 18432, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "rope_theta": 10000, "eos_token_id": 1, "bos_token_id": 0,
    "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "num_nextn_predict_layers": 1})");
}

ModelConfig parse(const json& j) { return parse_config(j.dump(), "dir/config.json"); }

struct Change {
  const char* label;
  const char* patch;  // JSON merge patch: null removes the key
  const char* field;
  ErrorCode code;
};

constexpr ErrorCode kFile = ErrorCode::kInvalidFile, kUnsup = ErrorCode::kUnsupported;

const Change kRefused[] = {
    {"HiddenNegative", R"({"hidden_size":-1})", "hidden_size", kFile},
    {"HiddenZero", R"({"hidden_size":0})", "hidden_size", kFile},
    {"HiddenHuge", R"({"hidden_size":1e30})", "hidden_size", kFile},
    {"HiddenText", R"({"hidden_size":"7168"})", "hidden_size", kFile},
    {"HiddenFraction", R"({"hidden_size":7168.5})", "hidden_size", kFile},
    {"HiddenMissing", R"({"hidden_size":null})", "hidden_size", kFile},
    {"HiddenBool", R"({"hidden_size":true})", "hidden_size", kFile},
    {"HiddenList", R"({"hidden_size":[1]})", "hidden_size", kFile},
    {"LayersBillion", R"({"num_hidden_layers":1000000000})", "num_hidden_layers", kFile},
    {"LayersMissing", R"({"num_hidden_layers":null})", "num_hidden_layers", kFile},
    {"HeadsZero", R"({"num_attention_heads":0})", "num_attention_heads", kFile},
    {"Heads129", R"({"num_attention_heads":129})", "num_attention_heads", kFile},
    {"VocabUnsignedMax", R"({"vocab_size":18446744073709551615})", "vocab_size", kFile},
    {"InnerZero", R"({"intermediate_size":0})", "intermediate_size", kFile},
    {"Rank", R"({"kv_lora_rank":256})", "kv_lora_rank", kFile},
    {"RopeDim", R"({"qk_rope_head_dim":32})", "qk_rope_head_dim", kFile},
    {"NopeMissing", R"({"qk_nope_head_dim":null})", "qk_nope_head_dim", kFile},
    {"NopeHuge", R"({"qk_nope_head_dim":4611686018427387904})", "qk_nope_head_dim", kFile},
    {"VMissing", R"({"v_head_dim":null})", "v_head_dim", kFile},
    {"QLoraZero", R"({"q_lora_rank":0})", "q_lora_rank", kFile},
    {"EpsZero", R"({"rms_norm_eps":0})", "rms_norm_eps", kFile},
    {"EpsText", R"({"rms_norm_eps":"1e-6"})", "rms_norm_eps", kFile},
    {"ThetaNegative", R"({"rope_theta":-1})", "rope_theta", kFile},
    {"ThetaOne", R"({"rope_theta":1})", "rope_theta", kFile},
    {"TieText", R"({"tie_word_embeddings":"no"})", "tie_word_embeddings", kFile},
    {"InterleaveNumber", R"({"rope_interleave":1})", "rope_interleave", kFile},
    {"MtpMany", R"({"num_nextn_predict_layers":9})", "num_nextn_predict_layers", kFile},
    {"EosOutside", R"({"eos_token_id":129280})", "eos_token_id", kFile},
    {"EosNegative", R"({"eos_token_id":-1})", "eos_token_id", kFile},
    {"EosText", R"({"eos_token_id":"1"})", "eos_token_id", kFile},
    {"EosListOutside", R"({"eos_token_id":[1,129280]})", "eos_token_id", kFile},
    {"EosUnsigned", R"({"eos_token_id":18446744073709551615})", "eos_token_id", kFile},
    {"BosOutside", R"({"bos_token_id":129280})", "bos_token_id", kFile},
    {"ExpertsHuge", R"({"n_routed_experts":65537})", "n_routed_experts", kFile},
    {"TopKZero", R"({"num_experts_per_tok":0})", "num_experts_per_tok", kFile},
    {"TopKAboveKept", R"({"num_experts_per_tok":129})", "num_experts_per_tok", kFile},
    {"GroupsNoDivisor", R"({"n_group":7})", "n_group", kFile},
    {"GroupsKept", R"({"topk_group":9})", "topk_group", kFile},
    {"FreqZero", R"({"moe_layer_freq":0})", "moe_layer_freq", kFile},
    {"ExpertInner", R"({"moe_intermediate_size":null})", "moe_intermediate_size", kFile},
    {"FactorZero", R"({"rope_scaling":{"factor":0}})", "rope_scaling.factor", kFile},
    {"FactorMissing", R"({"rope_scaling":{"factor":null}})", "rope_scaling.factor", kFile},
    {"ScalingText", R"({"rope_scaling":"yarn"})", "rope_scaling", kFile},
    {"Original", R"({"rope_scaling":{"original_max_position_embeddings":0}})",
     "original_max_position_embeddings", kFile},
    {"Blocks", R"({"quantization_config":{"weight_block_size":[64,64]}})", "weight_block_size",
     kFile},
    {"ModelTypeMissing", R"({"model_type":null})", "model_type", kFile},
    {"ModelType", R"({"model_type":"llama"})", "model_type: got 'llama'", kUnsup},
    {"RopeType", R"({"rope_scaling":{"type":"linear"}})", "rope_type: got 'linear'", kUnsup},
    {"Attention", R"({"rope_scaling":{"attention_factor":2}})", "attention_factor", kUnsup},
    {"Truncate", R"({"rope_scaling":{"truncate":false}})", "truncate", kUnsup},
    {"Act", R"({"hidden_act":"gelu"})", "hidden_act", kUnsup},
    {"Bias", R"({"attention_bias":true})", "attention_bias", kUnsup},
    {"Method", R"({"quantization_config":{"quant_method":"awq"}})", "quant_method: got 'awq'",
     kUnsup},
    {"Scoring", R"({"scoring_func":"softmax"})", "scoring_func", kUnsup},
    {"TopKMethod", R"({"topk_method":"best"})", "topk_method", kUnsup},
    {"Sparse", R"({"index_topk":2048})", "index_topk", kUnsup},
};

class Refused : public ::testing::TestWithParam<Change> {};

TEST_P(Refused, NamesFileAndField) {
  json j = v3();
  j.merge_patch(json::parse(GetParam().patch));
  try {
    parse(j);
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), GetParam().code) << e.what();
    const std::string message = e.what();
    EXPECT_NE(message.find("dir/config.json"), std::string::npos) << message;
    EXPECT_NE(message.find(GetParam().field), std::string::npos) << message;
  }
}

INSTANTIATE_TEST_SUITE_P(Config, Refused, ::testing::ValuesIn(kRefused),
                         [](const auto& info) { return std::string(info.param.label); });

TEST(Config, TextThatIsNoObjectIsRefused) {
  for (const std::string text : {"", "[]", "1", "{", "{\"a\":NaN}", "{\"a\":1,\"a\":1}", "{}"}) {
    EXPECT_THROW(parse_config(text, "config.json"), Error) << text;
  }
  EXPECT_THROW(parse_config(std::string(10 << 20, '['), "config.json"), Error);
  EXPECT_THROW(load_config(testing_files::fresh_directory()), Error);
}

TEST(Config, BothRopeSpellingsAgree) {
  json fresh = v3();
  fresh["rope_parameters"] = fresh["rope_scaling"];
  fresh["rope_parameters"].erase("type");
  fresh["rope_parameters"]["rope_type"] = "yarn";
  fresh["rope_parameters"]["rope_theta"] = 10000.0;
  fresh.erase("rope_scaling");
  fresh.erase("rope_theta");
  const ModelConfig a = parse(v3()), b = parse(fresh);
  EXPECT_EQ(a.rope_theta, b.rope_theta);
  ASSERT_TRUE(a.yarn && b.yarn);
  EXPECT_EQ(a.yarn->factor, b.yarn->factor);
  EXPECT_EQ(a.softmax_scale(), b.softmax_scale());
}

TEST(Config, MissingAndNullValuesTakeTheDefaults) {
  json j = v3();
  for (const char* key : {"q_lora_rank", "n_routed_experts", "n_shared_experts", "n_group",
                          "topk_group", "rope_scaling", "quantization_config"}) {
    j[key] = nullptr;
  }
  j.erase("num_nextn_predict_layers");
  j["eos_token_id"] = {1, 7};
  j["hidden_size"] = 7168.0;
  const ModelConfig c = parse(j);
  EXPECT_FALSE(c.q_lora_rank);
  EXPECT_FALSE(c.yarn);
  EXPECT_FALSE(c.fp8_weights);
  EXPECT_FALSE(c.tie_word_embeddings);
  EXPECT_TRUE(c.rope_interleave);
  EXPECT_EQ(c.num_experts, 0);
  EXPECT_EQ(c.num_nextn_predict_layers, 0);
  EXPECT_EQ(c.hidden_size, 7168);
  EXPECT_EQ(c.eos_token_ids, (std::vector<std::int64_t>{1, 7}));
}

TEST(Config, SoftmaxScalesOfThePublicModels) {
  json j = v3();
  EXPECT_NEAR(parse(j).softmax_scale(), 0.1352338, 5e-8);
  j["rope_scaling"]["mscale"] = j["rope_scaling"]["mscale_all_dim"] = 0.707;
  EXPECT_NEAR(parse(j).softmax_scale(), 0.1147214, 5e-8);
  j = v3();
  j["model_type"] = "kimi_k2";
  j["rope_scaling"]["factor"] = 32;
  EXPECT_NEAR(parse(j).softmax_scale(), 0.1308608, 5e-8);
  j["rope_scaling"]["factor"] = 64;
  EXPECT_NEAR(parse(j).softmax_scale(), 0.1446796, 5e-8);
  j.erase("rope_scaling");
  EXPECT_NEAR(parse(j).softmax_scale(), 0.0721688, 5e-8);
}

TEST(Config, V2DefaultsDifferFromV3) {
  json j = v3();
  j.erase("topk_method");
  j.erase("scoring_func");
  EXPECT_EQ(parse(j).routing, RoutingKind::kNoAuxTcSigmoid);
  EXPECT_TRUE(parse(j).norm_topk_prob);
  j["model_type"] = "deepseek_v2";
  EXPECT_EQ(parse(j).routing, RoutingKind::kGreedySoftmax);
  EXPECT_FALSE(parse(j).norm_topk_prob);
  j["topk_method"] = "group_limited_greedy";
  EXPECT_EQ(parse(j).routing, RoutingKind::kGroupLimitedGreedySoftmax);
}

}  // namespace
}  // namespace snapmla::model
