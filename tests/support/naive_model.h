// A whole DeepSeek-V2/V3 model, naively and in double, from the files on disk to logits. It shares
// no code with the engine: own reading of config.json and safetensors, own dequantisation, norms,
// RoPE with YaRN, attention (naive form) and routing. The oracle for random configurations, where
// no golden data exist.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace snapmla::oracle {

using Row = std::vector<double>;
using Rows = std::vector<Row>;  // [tokens][width]

struct NaiveResult {
  Rows logits;               // [tokens][vocab_size]
  std::vector<Rows> hidden;  // [layers][tokens][hidden_size], block outputs
  Rows latent, k_rope;       // of layer 0, as cached: [tokens][512], [64]
  std::vector<Rows> scores;  // of layer 0, before softmax: [tokens][heads][keys up to the token]
  Rows values;               // of layer 0: [tokens][heads * v_head_dim]
  std::vector<std::vector<std::vector<int>>> ids;  // [layers][tokens][top_k]; dense: empty
  std::vector<Rows> weights;                       // beside ids
};

class NaiveModel {
 public:
  // weights: a safetensors file, or a directory with model.safetensors or an index and its shards.
  NaiveModel(const std::filesystem::path& config_file, const std::filesystem::path& weights);

  // positions as the tokens are; keys are the tokens themselves, causally. layers < 0: all.
  NaiveResult forward(const std::vector<std::int32_t>& tokens,
                      const std::vector<std::int64_t>& positions) const;
  NaiveResult forward(const std::vector<std::int32_t>& tokens) const;  // from position 0

  std::int64_t vocab_size() const { return config_.at("vocab_size").get<std::int64_t>(); }

 private:
  // Stored transposed, [in][out], so that the inner loop runs over outputs.
  struct Matrix {
    std::size_t in = 0, out = 0;
    std::vector<double> columns;
  };
  struct Stored {
    std::string type;
    std::vector<std::size_t> shape;
    std::vector<std::uint8_t> bytes;
  };

  void read_file(const std::filesystem::path& path);
  std::vector<double> values(const std::string& name) const;
  const Matrix& matrix(const std::string& prefix) const;
  Row apply(const std::string& prefix, const Row& x) const;
  Row norm(const std::string& name, const Row& x, double eps) const;
  double number(const char* key, double missing) const;
  void rotate(double* x, std::int64_t position) const;
  Rows attention(const std::string& p, const Rows& x, const std::vector<std::int64_t>& positions,
                 NaiveResult* first) const;
  Row mlp(const std::string& p, const Row& x) const;
  Row experts(const std::string& p, const Row& x, std::vector<int>& ids, Row& weights) const;

  nlohmann::json config_;
  nlohmann::json rope_;  // the RoPE section of either spelling; empty object when there is none
  std::map<std::string, Stored> tensors_;
  mutable std::map<std::string, Matrix> matrices_;
  mutable std::map<std::string, Row> vectors_;
  Row frequencies_;
  double rope_multiplier_ = 1, softmax_scale_ = 1;
};

}  // namespace snapmla::oracle
