// Weights found by name in small generated checkpoints.
#include "model/weights.h"

#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "model/checkpoint_files.h"
#include "snapmla/error.h"

namespace snapmla::model {
namespace {

using Shape = std::vector<std::int64_t>;

// Tensors by name; f32 counts 0, 1, 2, ... within each tensor; e4m3 codes are all 1.0.
struct Files {
  std::map<std::string, std::pair<std::string, Shape>> tensors;

  void add(const std::string& name, Shape shape, const std::string& dtype = "F32") {
    tensors[name] = {dtype, std::move(shape)};
  }

  std::filesystem::path write() const {
    nlohmann::json header;
    std::string data;
    for (const auto& [name, entry] : tensors) {
      std::int64_t n = 1;
      for (std::int64_t extent : entry.second) n *= extent;
      const std::size_t begin = data.size();
      for (std::int64_t i = 0; i < n; ++i) {
        if (entry.first == "F32") {
          const auto value = static_cast<float>(i);
          data.append(reinterpret_cast<const char*>(&value), 4);
        } else {
          data.push_back('\x38');
        }
      }
      header[name] = {
          {"dtype", entry.first}, {"shape", entry.second}, {"data_offsets", {begin, data.size()}}};
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    const auto dir = testing_files::fresh_directory();
    testing_files::write_text(dir / "model.safetensors", testing_files::raw_file(text, data));
    return dir;
  }
};

constexpr std::int64_t kD = 8, kH = 2, kNope = 4, kV = 3, kInner = 4, kVocab = 16;

ModelConfig small() {
  ModelConfig c;
  c.hidden_size = kD;
  c.num_hidden_layers = 1;
  c.num_attention_heads = kH;
  c.vocab_size = kVocab;
  c.intermediate_size = kInner;
  c.qk_nope_head_dim = kNope;
  c.v_head_dim = kV;
  return c;
}

void add_layer(Files& f, const std::string& p) {
  f.add(p + "input_layernorm.weight", {kD});
  f.add(p + "post_attention_layernorm.weight", {kD});
  f.add(p + "self_attn.q_proj.weight", {kH * (kNope + 64), kD});
  f.add(p + "self_attn.kv_a_proj_with_mqa.weight", {576, kD});
  f.add(p + "self_attn.kv_a_layernorm.weight", {512});
  f.add(p + "self_attn.kv_b_proj.weight", {kH * (kNope + kV), 512});
  f.add(p + "self_attn.o_proj.weight", {kD, kH * kV});
  f.add(p + "mlp.gate_proj.weight", {kInner, kD});
  f.add(p + "mlp.up_proj.weight", {kInner, kD});
  f.add(p + "mlp.down_proj.weight", {kD, kInner});
}

Files dense() {
  Files f;
  f.add("model.embed_tokens.weight", {kVocab, kD});
  f.add("model.norm.weight", {kD});
  f.add("lm_head.weight", {kVocab, kD});
  add_layer(f, "model.layers.0.");
  return f;
}

void expect_refused(const Files& f, const ModelConfig& c, ErrorCode code, const std::string& name) {
  const Checkpoint checkpoint = Checkpoint::open(f.write());
  try {
    load_weights(checkpoint, c);
    ADD_FAILURE() << "accepted without " << name;
  } catch (const Error& e) {
    EXPECT_EQ(to_string(e.code()), std::string(to_string(code))) << e.what();
    EXPECT_NE(std::string(e.what()).find(name), std::string::npos) << e.what();
  }
}

TEST(Weights, KvBIsSplitPerHead) {
  const Checkpoint checkpoint = Checkpoint::open(dense().write());
  const ModelWeights w = load_weights(checkpoint, small());
  const LayerWeights& layer = w.layers.at(0);
  const auto kv_b = [](std::int64_t row, std::int64_t k) {
    return static_cast<float>(row * 512 + k);
  };
  for (std::int64_t h = 0; h < kH; ++h) {
    for (std::int64_t k = 0; k < 512; ++k) {
      for (std::int64_t i = 0; i < kNope; ++i)
        ASSERT_EQ(layer.w_uk.row<float>(h, k)[i], kv_b(h * (kNope + kV) + i, k));
      for (std::int64_t i = 0; i < kV; ++i)
        ASSERT_EQ(layer.w_uv.row<float>(h, i)[k], kv_b(h * (kNope + kV) + kNope + i, k));
    }
  }
  EXPECT_FALSE(w.mtp);
}

TEST(Weights, EveryMissingOrMisshapenTensorIsNamed) {
  const Files whole = dense();
  for (const auto& [name, entry] : whole.tensors) {
    Files f = whole;
    f.tensors.erase(name);
    expect_refused(f, small(), ErrorCode::kNotFound, name);
    f = whole;
    f.tensors[name].second.back() += 1;
    expect_refused(f, small(), ErrorCode::kInvalidFile, name);
  }
}

TEST(Weights, TiedHeadIsTheEmbedding) {
  Files f = dense();
  f.tensors.erase("lm_head.weight");
  ModelConfig c = small();
  c.tie_word_embeddings = true;
  const Checkpoint checkpoint = Checkpoint::open(f.write());
  const ModelWeights w = load_weights(checkpoint, c);
  EXPECT_EQ(w.lm_head.data.raw(), w.embed.raw());
}

TEST(Weights, AConfigLargerThanTheFilesIsRefusedFirst) {
  ModelConfig c = small();
  c.num_hidden_layers = 1000;
  c.intermediate_size = 1 << 22;
  expect_refused(dense(), c, ErrorCode::kInvalidFile, "bytes");
}

TEST(Weights, MtpLayerIsLoadedWhenThereAndAskedFor) {
  Files f = dense();
  const std::string p = "model.layers.1.";
  add_layer(f, p);
  f.add(p + "enorm.weight", {kD});
  f.add(p + "hnorm.weight", {kD});
  f.add(p + "shared_head.norm.weight", {kD});
  f.add(p + "eh_proj.weight", {kD, 2 * kD});
  ModelConfig c = small();
  const Checkpoint checkpoint = Checkpoint::open(f.write());
  EXPECT_FALSE(load_weights(checkpoint, c).mtp);
  c.num_nextn_predict_layers = 1;
  const ModelWeights w = load_weights(checkpoint, c);
  ASSERT_TRUE(w.mtp);
  EXPECT_EQ(w.mtp->eh_proj.data.dim(1), 2 * kD);
  EXPECT_EQ(w.layers.size(), 1u);
  f.tensors.erase(p + "hnorm.weight");
  expect_refused(f, c, ErrorCode::kNotFound, p + "hnorm.weight");
}

TEST(Weights, Fp8ScalesCoverPartialEdgeBlocks) {
  Files f = dense();
  const std::string name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight";
  f.add(name, {576, kD}, "F8_E4M3");
  expect_refused(f, small(), ErrorCode::kInvalidFile, name);  // not an fp8 model
  ModelConfig c = small();
  c.fp8_weights = true;
  expect_refused(f, c, ErrorCode::kNotFound, name + "_scale_inv");
  f.add(name + "_scale_inv", {4, 1});
  expect_refused(f, c, ErrorCode::kInvalidFile, name + "_scale_inv");
  f.add(name + "_scale_inv", {5, 1});
  const Checkpoint checkpoint = Checkpoint::open(f.write());
  EXPECT_EQ(load_weights(checkpoint, c).layers[0].kv_a.scale_inv.dim(0), 5);
}

TEST(Weights, FusedExpertsAreSplitIntoGateAndUp) {
  ModelConfig c = small();
  c.num_experts = 2;
  c.moe_intermediate_size = kInner;
  Files f = dense();
  const std::string p = "model.layers.0.mlp.";
  f.add(p + "gate.weight", {2, kD});
  f.add(p + "gate.e_score_correction_bias", {2});
  f.add(p + "experts.gate_up_proj", {2, 2 * kInner, kD});
  f.add(p + "experts.down_proj", {2, kD, kInner});
  const Checkpoint checkpoint = Checkpoint::open(f.write());
  const ModelWeights w = load_weights(checkpoint, c);
  const auto& experts = w.layers[0].experts;
  ASSERT_EQ(experts.size(), 2u);
  EXPECT_EQ(experts[1].gate.data.data<float>()[0], 2.0f * kInner * kD);
  EXPECT_EQ(experts[1].up.data.data<float>()[0], 3.0f * kInner * kD);
  EXPECT_EQ(experts[1].down.data.data<float>()[0], 1.0f * kInner * kD);
  EXPECT_EQ(w.layers[0].router_bias.data<float>()[1], 1.0f);
  f.tensors.erase(p + "experts.down_proj");
  expect_refused(f, c, ErrorCode::kNotFound, p + "experts.down_proj");
}

}  // namespace
}  // namespace snapmla::model
