// snapmla inspect --cache: the three forms, the picture, and what it refuses.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "e2e/process.h"

namespace snapmla::e2e {
namespace {

using testing::ContainsRegex;
using testing::HasSubstr;

Result inspect_cache(const std::vector<std::string>& flags) {
  std::vector<std::string> args = {"inspect", "--cache", "-m", shipped_model()};
  args.insert(args.end(), flags.begin(), flags.end());
  return snapmla(args);
}

std::string contents(const std::string& path) {
  std::ifstream in(path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

TEST(InspectCache, WithoutATextHasOneOfItsOwn) {
  const Result r = inspect_cache({"--tokens", "300"});
  EXPECT_EQ(r.status, 0);
  EXPECT_EQ(r.err, "");
  EXPECT_THAT(r.out, HasSubstr("Cache of snapmla-20m: 5 layers, 300 tokens of the built-in text "
                               "(which has 4401); rows in f32"));
  // Magnitudes, spread of the scores, four tables of errors, feedback rounding.
  EXPECT_EQ(count(r.out, "\n4  "), 7u) << r.out;
  EXPECT_THAT(r.out, ContainsRegex("snapmla +A2 +token +bf16/scale +2\\.[0-9]+ +0\\.1"));
  EXPECT_THAT(r.out, ContainsRegex("\ntoken +safe +no: attention in [1-5] of 5\n"));
  EXPECT_THAT(r.out, ContainsRegex("\nbf16/scale +- +safe\n"));
  EXPECT_THAT(r.out, ContainsRegex("\n4 +0\\.[1-5][0-9]\n"));  // left by feedback rounding
  for (const std::string& line : lines(r.out)) EXPECT_LE(line.size(), 118u) << line;
}

TEST(InspectCache, JsonHasEverything) {
  const Result r = inspect_cache({"--tokens", "200", "-o", "json"});
  ASSERT_EQ(r.status, 0) << r.err;
  const auto report = nlohmann::json::parse(r.out);
  EXPECT_EQ(report.at("tokens"), 200);
  EXPECT_EQ(report.at("rows"), "f32");
  ASSERT_EQ(report.at("layers").size(), 5u);
  for (const auto& layer : report.at("layers")) {
    std::int64_t in_binades = 0;
    for (const auto& [exponent, n] :
         layer.at("latent").at("binades").get<std::vector<std::pair<int, std::int64_t>>>())
      in_binades += n;
    EXPECT_EQ(in_binades + layer["latent"].at("zeros").get<std::int64_t>(), 200 * 512);
    EXPECT_EQ(layer["latent"].at("channel_max").size(), 512u);
    EXPECT_EQ(layer.at("rope").at("channel_max").size(), 64u);
    const auto& p = layer["rope"].at("percentiles");
    EXPECT_LE(p.at("50").get<double>(), p.at("99.9").get<double>());
    EXPECT_LE(p.at("99.9").get<double>(), layer["rope"].at("max").get<double>());
    EXPECT_EQ(layer.at("latent_errors").size(), 9u);
    EXPECT_EQ(layer.at("rope_errors").size(), 9u);
    EXPECT_EQ(layer.at("layout_errors").size(), 6u);
    // The shipped model's kv_b_proj has fewer strong directions than 512.
    EXPECT_GT(layer.at("feedback_left").get<double>(), 0.1);
    EXPECT_LT(layer.at("feedback_left").get<double>(), 0.6);
    // e4m3 costs 2 to 3% wherever its range suffices, bf16 a sixteenth of it.
    const auto& latent = layer["latent_errors"];
    EXPECT_NEAR(latent.at("token").at("relative_l2").get<double>(), 0.026, 0.002);
    EXPECT_NEAR(latent.at("bf16").at("relative_l2").get<double>(), 0.00166, 0.0001);
    EXPECT_TRUE(latent.at("token").at("safe").get<bool>());
    EXPECT_GT(layer["rope_errors"].at("token").at("kl_mean").get<double>(),
              50 * layer["rope_errors"].at("bf16/scale").at("kl_mean").get<double>());
  }
}

TEST(InspectCache, MarkdownTables) {
  const Result r = inspect_cache({"-p", "import numpy as np\n", "-o", "md", "--kv-cache", "bf16"});
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_EQ(count(r.out, "\n### "), 14u);
  EXPECT_THAT(r.out, HasSubstr("rows in bf16"));
  // Rows that are bf16 already lose nothing by it.
  EXPECT_THAT(r.out, ContainsRegex("### RoPE part: relative L2 error, %\n\n[^\n]*\n[^\n]*\n"
                                   "\\| 0 +\\| +0 \\|"));
  for (const std::string& line : lines(r.out)) {
    if (!line.starts_with("|")) continue;
    EXPECT_TRUE(line.ends_with("|")) << line;
  }
}

TEST(InspectCache, DrawsAPicture) {
  const std::string dir = fresh_directory(), text = dir + "/a<b>&c.txt", svg = dir + "/cache.svg";
  std::ofstream(text) << "def f(x):\n    return x + 1\n";
  const Result r = inspect_cache({"-f", text, "--svg", svg});
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("tokens of " + text));
  const std::string picture = contents(svg);
  EXPECT_THAT(picture, testing::StartsWith("<svg xmlns=\"http://www.w3.org/2000/svg\""));
  EXPECT_THAT(picture, testing::EndsWith("</svg>\n"));
  EXPECT_THAT(picture, HasSubstr("a&lt;b&gt;&amp;c.txt"));
  EXPECT_THAT(picture, testing::Not(HasSubstr("nan")));
  // A dot per layer for each of 9 + 9 schemes twice, 6 layouts and 9 values, and a legend.
  EXPECT_EQ(count(picture, "<circle "), (5u + 1) * (4 * 9 + 6 + 9));
  // 64 rows of channels for both parts and each layer; the binades come on top.
  EXPECT_GT(count(picture, "<rect "), 5u * 2 * 64 + 5 * 2 * 8);
  EXPECT_EQ(count(picture, "<text "), count(picture, "</text>"));
}

TEST(InspectCache, AnotherCheckpointNeedsItsOwnTokenizer) {
  const std::string dir = SNAPMLA_SOURCE_DIR "/tests/oracles/o1";
  const Result r = snapmla({"inspect", "--cache", dir});
  EXPECT_EQ(r.status, 1);
  EXPECT_EQ(r.err, "snapmla: error: " + dir + "/tokenizer.json: no such file\n");
}

TEST(InspectCache, WhatCannotBeDoneIsOneErrorLine) {
  const std::string dir = fresh_directory();
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"--svg", dir + "/no/such.svg"}, dir + "/no/such.svg: cannot be written"},
      {{"-f", dir + "/none"}, dir + "/none: cannot be read: No such file or directory"},
      {{"--tokens", "16385"},
       "--tokens: got 16385, accepted are at most the 16384 of the model's context"}};
  for (const auto& [flags, message] : cases) {
    const Result r = inspect_cache(flags);
    EXPECT_EQ(r.status, 1);
    EXPECT_EQ(r.out, "");
    EXPECT_EQ(r.err, "snapmla: error: " + message + "\n");
  }
}

}  // namespace
}  // namespace snapmla::e2e
