#include "support/naive_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <numeric>
#include <set>
#include <stdexcept>

namespace snapmla::oracle {
namespace {

namespace fs = std::filesystem;

std::string slurp(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

double from_bf16(const std::uint8_t* p) {
  const std::uint32_t bits =
      (static_cast<std::uint32_t>(p[1]) << 24) | (static_cast<std::uint32_t>(p[0]) << 16);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

double from_e4m3(unsigned code) {
  const unsigned exponent = (code & 0x78u) >> 3, fraction = code & 7u;
  if ((code & 0x7fu) == 0x7fu) return std::nan("");
  const double size =
      exponent == 0 ? fraction / 512.0 : (1.0 + fraction / 8.0) * std::pow(2.0, exponent - 7.0);
  return (code & 0x80u) != 0 ? -size : size;
}

// g(f, a) of YaRN: the attention temperature.
double temperature(double factor, double scale) {
  return factor > 1 ? 1 + 0.1 * scale * std::log(factor) : 1;
}

}  // namespace

NaiveModel::NaiveModel(const fs::path& config_file, const fs::path& weights)
    : config_(nlohmann::json::parse(slurp(config_file))), rope_(nlohmann::json::object()) {
  if (!fs::is_directory(weights)) {
    read_file(weights);
  } else if (fs::exists(weights / "model.safetensors")) {
    read_file(weights / "model.safetensors");
  } else {
    const auto index = nlohmann::json::parse(slurp(weights / "model.safetensors.index.json"));
    std::set<std::string> shards;
    for (const auto& [name, shard] : index.at("weight_map").items()) shards.insert(shard);
    for (const std::string& shard : shards) read_file(weights / shard);
  }
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    if (rope_.empty() && config_.contains(key) && config_[key].is_object()) rope_ = config_[key];
  }
  const double theta = rope_.value("rope_theta", number("rope_theta", 10000));
  const std::string kind = rope_.value("rope_type", rope_.value("type", std::string("default")));
  const int pairs = 32;
  for (int j = 0; j < pairs; ++j) frequencies_.push_back(std::pow(theta, -j / double(pairs)));
  softmax_scale_ = 1 / std::sqrt(number("qk_nope_head_dim", 0) + 64);
  if (kind != "yarn") return;
  const double factor = rope_.at("factor"), context = rope_.at("original_max_position_embeddings");
  // Which pair completes n turns within the original context.
  const auto pair_with_turns = [&](double n) {
    return pairs * std::log(context / (n * 2 * std::acos(-1.0))) / std::log(theta);
  };
  const double first = std::max(0.0, std::floor(pair_with_turns(rope_.value("beta_fast", 32.0))));
  double last = std::min(63.0, std::ceil(pair_with_turns(rope_.value("beta_slow", 1.0))));
  if (last == first) last += 0.001;
  for (int j = 0; j < pairs; ++j) {
    const double keep = 1 - std::min(1.0, std::max(0.0, (j - first) / (last - first)));
    double& f = frequencies_[static_cast<std::size_t>(j)];
    f = keep * f + (1 - keep) * f / factor;
  }
  const double all = rope_.value("mscale_all_dim", 0.0), one = rope_.value("mscale", 0.0);
  rope_multiplier_ = all != 0 && one != 0 ? temperature(factor, one) / temperature(factor, all)
                                          : temperature(factor, 1);
  if (all != 0) softmax_scale_ *= temperature(factor, all) * temperature(factor, all);
}

double NaiveModel::number(const char* key, double missing) const {
  return config_.contains(key) && config_[key].is_number() ? config_[key].get<double>() : missing;
}

void NaiveModel::read_file(const fs::path& path) {
  const std::string file = slurp(path);
  std::uint64_t header_size = 0;
  for (std::size_t i = 0; i < 8; ++i)
    header_size |= static_cast<std::uint64_t>(static_cast<unsigned char>(file.at(i))) << (8 * i);
  const auto header = nlohmann::json::parse(file.substr(8, header_size));
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    Stored s;
    s.type = entry.at("dtype");
    s.shape = entry.at("shape").get<std::vector<std::size_t>>();
    const auto range = entry.at("data_offsets").get<std::vector<std::size_t>>();
    const std::string data = file.substr(8 + header_size + range.at(0), range.at(1) - range.at(0));
    s.bytes.assign(data.begin(), data.end());
    tensors_[name] = std::move(s);
  }
}

// Row-major values, dequantised with the block scales where there are any.
std::vector<double> NaiveModel::values(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw std::runtime_error("no tensor " + name);
  const Stored& s = found->second;
  std::size_t count = 1;
  for (std::size_t extent : s.shape) count *= extent;
  std::vector<double> out(count);
  for (std::size_t i = 0; i < count; ++i) {
    if (s.type == "F32") {
      float value;
      std::memcpy(&value, &s.bytes.at(4 * i + 3) - 3, 4);
      out[i] = value;
    } else if (s.type == "BF16") {
      out[i] = from_bf16(&s.bytes.at(2 * i + 1) - 1);
    } else if (s.type == "F8_E4M3") {
      out[i] = from_e4m3(s.bytes.at(i));
    } else {
      throw std::runtime_error("type " + s.type + " of " + name);
    }
  }
  if (s.type == "F8_E4M3") {
    const std::vector<double> scale = values(name + "_scale_inv");
    const std::size_t width = s.shape.at(1), blocks = (width + 127) / 128;
    for (std::size_t i = 0; i < count; ++i)
      out[i] *= scale.at(i / width / 128 * blocks + i % width / 128);
  }
  return out;
}

const NaiveModel::Matrix& NaiveModel::matrix(const std::string& prefix) const {
  const auto [at, fresh] = matrices_.try_emplace(prefix);
  if (fresh) {
    const std::vector<double> rows = values(prefix + ".weight");
    Matrix& m = at->second;
    m.out = tensors_.at(prefix + ".weight").shape.at(0);
    m.in = tensors_.at(prefix + ".weight").shape.at(1);
    m.columns.resize(rows.size());
    for (std::size_t o = 0; o < m.out; ++o)
      for (std::size_t i = 0; i < m.in; ++i) m.columns[i * m.out + o] = rows[o * m.in + i];
  }
  return at->second;
}

Row NaiveModel::apply(const std::string& prefix, const Row& x) const {
  const Matrix& m = matrix(prefix);
  if (m.in != x.size()) throw std::runtime_error(prefix + ": width");
  Row y(m.out, 0.0);
  for (std::size_t i = 0; i < m.in; ++i) {
    const double* column = &m.columns[i * m.out];
    const double factor = x[i];
    for (std::size_t o = 0; o < m.out; ++o) y[o] += factor * column[o];
  }
  return y;
}

Row NaiveModel::norm(const std::string& name, const Row& x, double eps) const {
  const auto [at, fresh] = vectors_.try_emplace(name);
  if (fresh) at->second = values(name + ".weight");
  const double size = std::inner_product(x.begin(), x.end(), x.begin(), 0.0);
  const double length = std::sqrt(size / static_cast<double>(x.size()) + eps);
  Row y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) y[i] = at->second.at(i) * x[i] / length;
  return y;
}

// 64 values in place; the result always has its pairs adjacent.
void NaiveModel::rotate(double* x, std::int64_t position) const {
  const bool adjacent = !config_.contains("rope_interleave") || config_["rope_interleave"];
  double out[64];
  for (std::size_t j = 0; j < 32; ++j) {
    const double a = adjacent ? x[2 * j] : x[j], b = adjacent ? x[2 * j + 1] : x[j + 32];
    const double angle = static_cast<double>(position) * frequencies_[j];
    out[2 * j] = rope_multiplier_ * (a * std::cos(angle) - b * std::sin(angle));
    out[2 * j + 1] = rope_multiplier_ * (b * std::cos(angle) + a * std::sin(angle));
  }
  std::copy_n(out, 64, x);
}

Rows NaiveModel::attention(const std::string& p, const Rows& x,
                           const std::vector<std::int64_t>& positions, NaiveResult* first) const {
  const double mla_eps = 1e-6;  // transformers builds these two norms with its class default
  const auto heads = static_cast<std::size_t>(number("num_attention_heads", 0)),
             nope = static_cast<std::size_t>(number("qk_nope_head_dim", 0)),
             v_dim = static_cast<std::size_t>(number("v_head_dim", 0));
  const std::size_t q_dim = nope + 64, up_dim = nope + v_dim;
  Rows queries, expanded, ropes;
  for (std::size_t t = 0; t < x.size(); ++t) {
    Row q =
        number("q_lora_rank", 0) > 0
            ? apply(p + "q_b_proj", norm(p + "q_a_layernorm", apply(p + "q_a_proj", x[t]), mla_eps))
            : apply(p + "q_proj", x[t]);
    for (std::size_t h = 0; h < heads; ++h) rotate(&q[h * q_dim + nope], positions[t]);
    queries.push_back(std::move(q));
    const Row kv = apply(p + "kv_a_proj_with_mqa", x[t]);
    const Row latent = norm(p + "kv_a_layernorm", Row(kv.begin(), kv.begin() + 512), mla_eps);
    Row rope(kv.begin() + 512, kv.end());
    rotate(rope.data(), positions[t]);
    expanded.push_back(apply(p + "kv_b_proj", latent));
    if (first) first->latent.push_back(latent);
    if (first) first->k_rope.push_back(rope);
    if (first) {
      Row& v = first->values.emplace_back();
      for (std::size_t h = 0; h < heads; ++h) {
        const auto begin = expanded.back().begin() + static_cast<std::ptrdiff_t>(h * up_dim + nope);
        v.insert(v.end(), begin, begin + static_cast<std::ptrdiff_t>(v_dim));
      }
    }
    ropes.push_back(std::move(rope));
  }
  Rows result;
  for (std::size_t t = 0; t < x.size(); ++t) {
    Row mixed(heads * v_dim, 0.0);
    if (first) first->scores.emplace_back();
    for (std::size_t h = 0; h < heads; ++h) {
      const double* q = &queries[t][h * q_dim];
      Row score;
      for (std::size_t j = 0; j <= t; ++j) {
        const double* k = &expanded[j][h * up_dim];
        score.push_back(softmax_scale_ *
                        (std::inner_product(q, q + nope, k, 0.0) +
                         std::inner_product(q + nope, q + q_dim, ropes[j].begin(), 0.0)));
      }
      if (first) first->scores.back().push_back(score);
      const double top = *std::max_element(score.begin(), score.end());
      double sum = 0;
      for (double& s : score) sum += (s = std::exp(s - top));
      for (std::size_t j = 0; j <= t; ++j) {
        for (std::size_t d = 0; d < v_dim; ++d)
          mixed[h * v_dim + d] += score[j] / sum * expanded[j][h * up_dim + nope + d];
      }
    }
    result.push_back(apply(p + "o_proj", mixed));
  }
  return result;
}

Row NaiveModel::mlp(const std::string& p, const Row& x) const {
  Row gate = apply(p + "gate_proj", x);
  const Row up = apply(p + "up_proj", x);
  for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
  return apply(p + "down_proj", gate);
}

Row NaiveModel::experts(const std::string& p, const Row& x, std::vector<int>& ids,
                        Row& weights) const {
  Row score = apply(p + "gate", x);
  const bool v2 = config_.at("model_type") == "deepseek_v2";
  const std::string method = config_.value("topk_method", v2 ? "greedy" : "noaux_tc");
  if (v2) {
    const double top = *std::max_element(score.begin(), score.end());
    double sum = 0;
    for (double& s : score) sum += (s = std::exp(s - top));
    for (double& s : score) s /= sum;
  } else {
    for (double& s : score) s = 1 / (1 + std::exp(-s));
  }
  Row choice = score;
  if (tensors_.contains(p + "gate.e_score_correction_bias")) {
    const Row bias = values(p + "gate.e_score_correction_bias");
    for (std::size_t e = 0; e < choice.size(); ++e) choice[e] += bias.at(e);
  }
  const auto groups = static_cast<std::size_t>(number("n_group", 1));
  const auto kept = static_cast<std::size_t>(number("topk_group", 1));
  if (method != "greedy" && groups > 1) {
    const std::size_t size = choice.size() / groups;
    std::vector<std::pair<double, std::size_t>> ranks;  // minus the rank, so that sort() suits
    for (std::size_t g = 0; g < groups; ++g) {
      Row members(choice.begin() + static_cast<std::ptrdiff_t>(g * size),
                  choice.begin() + static_cast<std::ptrdiff_t>((g + 1) * size));
      std::sort(members.rbegin(), members.rend());
      ranks.emplace_back(-(v2 || size < 2 ? members[0] : members[0] + members[1]), g);
    }
    std::sort(ranks.begin(), ranks.end());
    for (std::size_t i = kept; i < groups; ++i)
      for (std::size_t e = 0; e < size; ++e) choice[ranks[i].second * size + e] = -INFINITY;
  }
  Row out(x.size(), 0.0);
  const auto top_k = static_cast<std::size_t>(number("num_experts_per_tok", 1));
  for (std::size_t k = 0; k < top_k; ++k) {
    const auto best = std::max_element(choice.begin(), choice.end());
    ids.push_back(static_cast<int>(best - choice.begin()));
    weights.push_back(score[static_cast<std::size_t>(ids.back())]);
    *best = -INFINITY;
  }
  const bool normalise = config_.value("norm_topk_prob", !v2);
  const double sum = std::accumulate(weights.begin(), weights.end(), 1e-20);
  for (double& w : weights) w *= number("routed_scaling_factor", 1) / (normalise ? sum : 1);
  for (std::size_t k = 0; k < top_k; ++k) {
    const Row y = mlp(p + "experts." + std::to_string(ids[k]) + ".", x);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] += weights[k] * y[i];
  }
  if (number("n_shared_experts", 0) > 0) {
    const Row y = mlp(p + "shared_experts.", x);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] += y[i];
  }
  return out;
}

NaiveResult NaiveModel::forward(const std::vector<std::int32_t>& tokens,
                                const std::vector<std::int64_t>& positions) const {
  NaiveResult result;
  const double eps = number("rms_norm_eps", 1e-6);
  const auto width = static_cast<std::size_t>(number("hidden_size", 0));
  const auto [embedding, fresh] = vectors_.try_emplace("embedding");
  if (fresh) embedding->second = values("model.embed_tokens.weight");
  Rows x;
  for (std::int32_t token : tokens) {
    const auto at = embedding->second.begin() + token * static_cast<std::ptrdiff_t>(width);
    x.emplace_back(at, at + static_cast<std::ptrdiff_t>(width));
  }
  const auto add = [](Row& to, const Row& from) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += from.at(i);
  };
  const int layers = config_.at("num_hidden_layers");
  for (int layer = 0; layer < layers; ++layer) {
    const std::string p = "model.layers." + std::to_string(layer) + ".";
    Rows normed;
    for (const Row& row : x) normed.push_back(norm(p + "input_layernorm", row, eps));
    const Rows mixed =
        attention(p + "self_attn.", normed, positions, layer == 0 ? &result : nullptr);
    const bool moe = number("n_routed_experts", 0) > 0 &&
                     layer >= static_cast<int>(number("first_k_dense_replace", 0)) &&
                     layer % static_cast<int>(number("moe_layer_freq", 1)) == 0;
    result.ids.emplace_back();
    result.weights.emplace_back();
    for (std::size_t t = 0; t < x.size(); ++t) {
      add(x[t], mixed[t]);
      const Row n = norm(p + "post_attention_layernorm", x[t], eps);
      if (moe) {
        std::vector<int> ids;
        Row weights;
        add(x[t], experts(p + "mlp.", n, ids, weights));
        result.ids.back().push_back(ids);
        result.weights.back().push_back(weights);
      } else {
        add(x[t], mlp(p + "mlp.", n));
      }
    }
    result.hidden.push_back(x);
  }
  const bool tied = config_.value("tie_word_embeddings", false);
  for (const Row& row : x) {
    result.logits.push_back(
        apply(tied ? "model.embed_tokens" : "lm_head", norm("model.norm", row, eps)));
  }
  return result;
}

NaiveResult NaiveModel::forward(const std::vector<std::int32_t>& tokens) const {
  std::vector<std::int64_t> positions(tokens.size());
  std::iota(positions.begin(), positions.end(), 0);
  return forward(tokens, positions);
}

}  // namespace snapmla::oracle
