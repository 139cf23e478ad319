// tools/stress_copy.py: its copies compute the same with a BF16 cache, bit for bit, and stretch
// what an FP8 cache has to hold.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "e2e/process.h"
#include "engine/oracle_files.h"
#include "model/safetensors.h"

namespace snapmla::e2e {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

Result stress_copy(const std::string& model, const std::string& out,
                   const std::vector<std::string>& flags) {
  std::vector<std::string> args = {"python3", SNAPMLA_SOURCE_DIR "/tools/stress_copy.py", model,
                                   out};
  args.insert(args.end(), flags.begin(), flags.end());
  return run_program("/usr/bin/env", args);
}

std::string copy_of(const std::string& model, const std::vector<std::string>& flags) {
  const std::string out = fresh_directory() + "/copy";
  const Result r = stress_copy(model, out, flags);
  EXPECT_EQ(r.status, 0) << r.err;
  return out;
}

// 130 tokens: three pages, none of them special.
std::string ids(std::int64_t vocab) {
  std::string text;
  for (std::int64_t i = 0; i < 130; ++i) {
    if (i) text += ',';
    text += std::to_string((i * i * 7 + i * 31 + 3) % vocab);
  }
  return text;
}

// The whole file that `snapmla logits` writes.
std::string logits_file(const std::string& model, std::int64_t vocab,
                        const std::vector<std::string>& flags) {
  const std::string path = fresh_directory() + "/logits.safetensors";
  std::vector<std::string> args = {"logits", "--tokens", ids(vocab), "-m", model, "-o", path};
  args.insert(args.end(), flags.begin(), flags.end());
  const Result r = snapmla(args);
  EXPECT_EQ(r.status, 0) << r.err;
  std::ifstream in(path, std::ios::binary);
  std::ostringstream all;
  all << in.rdbuf();
  EXPECT_GT(all.str().size(), 130u * 256 * 4);
  return all.str();
}

struct Case {
  std::string name;
  std::int64_t vocab;
  std::string pairs, channels;
};

class StressCopy : public testing::TestWithParam<Case> {};

// The shipped model (one query projection, FP8), o4 (two, FP8 with edge blocks), o7_half (RoPE
// pairs in the other order, BF16).
TEST_P(StressCopy, ComputesTheSameFromABf16Cache) {
  const Case& c = GetParam();
  const std::string model =
      c.name == "shipped" ? shipped_model() : oracle::checkpoint_dir(c.name).string();
  const std::string plain = copy_of(model, {"-n", "0"});
  const std::string stretched =
      copy_of(model, {"--rope-pairs", c.pairs, "--latent-channels", c.channels, "-n", "13"});
  for (const std::vector<std::string>& path :
       {std::vector<std::string>{}, std::vector<std::string>{"--decode", "3"}}) {
    std::vector<std::string> bf16 = path, fp8 = path;
    bf16.insert(bf16.end(), {"--kv-cache", "bf16"});
    fp8.insert(fp8.end(), {"--kv-cache", "fp8"});
    EXPECT_TRUE(logits_file(plain, c.vocab, bf16) == logits_file(stretched, c.vocab, bf16));
    // And the copy is no copy: an FP8 cache feels it.
    EXPECT_FALSE(logits_file(plain, c.vocab, fp8) == logits_file(stretched, c.vocab, fp8));
  }
}

INSTANTIATE_TEST_SUITE_P(Models, StressCopy,
                         testing::Values(Case{"shipped", 2048, "0-3,31", "7,100,511"},
                                         Case{"o4", 256, "all", "0-200"},
                                         Case{"o7_half", 256, "2,30", "5"}),
                         [](const auto& info) { return info.param.name; });

// -n 0 multiplies the FP8 blocks out: the weights are those of the original to a rounding to bf16.
TEST(StressCopyTool, ZeroOnlyMultipliesTheBlocksOut) {
  const std::string plain = copy_of(shipped_model(), {"-n", "0"});
  const model::Checkpoint original = model::Checkpoint::open(shipped_model());
  const model::Checkpoint copy = model::Checkpoint::open(plain);
  std::size_t compared = 0;
  for (const auto& [name, got] : copy.tensors()) {
    const TensorView want = original.tensors().at(name);
    ASSERT_EQ(got.numel(), want.numel()) << name;
    if (want.dtype() != DType::kE4M3) continue;
    ASSERT_EQ(got.dtype(), DType::kBF16) << name;
    const TensorView scale = original.tensors().at(name + "_scale_inv");
    for (std::int64_t i = 0; i < want.dim(0); i += 37) {
      for (std::int64_t j = 0; j < want.dim(1); ++j) {
        const unsigned code = want.row<Float8E4M3>(i)[j].bits, fraction = code & 7;
        const int exponent = static_cast<int>(code >> 3 & 15);
        double value = exponent ? (1 + fraction / 8.0) * std::exp2(exponent - 7) : fraction / 512.0;
        value *= (code & 128 ? -1.0 : 1.0) * scale.row<float>(i / 128)[j / 128];
        const std::uint32_t bits = static_cast<std::uint32_t>(got.row<BFloat16>(i)[j].bits) << 16;
        float rounded;
        std::memcpy(&rounded, &bits, 4);
        ASSERT_LE(std::fabs(rounded - value), std::fabs(value) / 256) << name;
        ++compared;
      }
    }
  }
  EXPECT_GT(compared, 400000u);
  EXPECT_EQ(copy.tensors().count("model.layers.0.self_attn.kv_b_proj.weight_scale_inv"), 0u);
}

TEST(StressCopyTool, TheCopySaysWhatItIs) {
  const std::string copy =
      copy_of(shipped_model(), {"--rope-pairs", "1", "--latent-channels", "2-3", "-n", "6"});
  std::ifstream file(copy + "/config.json");
  const auto config = nlohmann::json::parse(file);
  EXPECT_EQ(config.at("stress_copy").at("n"), 6);
  EXPECT_EQ(config["stress_copy"].at("rope_pairs"), nlohmann::json({1}));
  EXPECT_EQ(config["stress_copy"].at("latent_channels"), nlohmann::json({2, 3}));
  EXPECT_FALSE(config.contains("quantization_config"));
  std::ostringstream readme;
  readme << std::ifstream(copy + "/README.md").rdbuf();
  EXPECT_THAT(readme.str(), HasSubstr("A stress copy of snapmla-20m"));
  EXPECT_THAT(readme.str(), HasSubstr("Not natural data."));
  const std::string svg = copy + "/cache.svg";
  for (const char* form : {"table", "json", "md"}) {
    const Result r =
        snapmla({"inspect", "--cache", copy, "-p", "import os", "-o", form, "--svg", svg});
    EXPECT_EQ(r.status, 0) << r.err;
    EXPECT_THAT(r.out, HasSubstr("Not natural data")) << form;
  }
  std::ostringstream picture;
  picture << std::ifstream(svg).rdbuf();
  EXPECT_THAT(picture.str(), HasSubstr("Not natural data"));
}

TEST(StressCopyTool, BadInputIsOneErrorLine) {
  const std::string full = fresh_directory(), out = fresh_directory() + "/copy";
  std::ofstream(full + "/file") << "x";
  const std::string model = shipped_model();
  const auto refused = [&](const std::string& to, const std::vector<std::string>& flags,
                           const std::string& message) {
    const Result r = stress_copy(model, to, flags);
    EXPECT_EQ(r.status, 1);
    EXPECT_EQ(r.out, "");
    EXPECT_EQ(lines(r.err).size(), 1u) << r.err;
    EXPECT_THAT(r.err, HasSubstr(message));
  };
  refused(out, {"-n", "3"}, "error: got neither --rope-pairs nor --latent-channels");
  refused(out, {"-n", "3", "--rope-pairs", "32"},
          "--rope-pairs: got '32', accepted are numbers 0 to 31");
  refused(out, {"-n", "3", "--rope-pairs", "5-2"}, "--rope-pairs: got '5-2'");
  refused(out, {"-n", "3", "--latent-channels", "x"},
          "--latent-channels: got 'x', accepted are numbers 0 to 511");
  refused(full, {"-n", "3", "--rope-pairs", "1"}, "exists and is not empty");
  EXPECT_EQ(stress_copy(model, out, {"-n", "61"}).status, 2);
  const Result none = stress_copy(full, out, {"-n", "1", "--rope-pairs", "0"});
  EXPECT_EQ(none.status, 1);
  EXPECT_THAT(none.err, HasSubstr("config.json"));
}

}  // namespace
}  // namespace snapmla::e2e
