// snapmla bench: every output form is read back, results are what was asked for, and wrong
// arguments give one clear error.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "e2e/process.h"

namespace snapmla {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;
using Words = std::vector<std::string>;

Words attention(const Words& more) {
  Words words = {"bench", "attention", "--heads",   "3,8", "--context",  "100", "--seqlen-q", "2",
                 "-b",    "2",         "--threads", "2",   "--min-time", "0",   "-r",         "2"};
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

// The fields of one line of CSV without quotes.
Words fields(const std::string& line) {
  Words list = {""};
  for (char c : line) {
    if (c == ',') {
      list.emplace_back();
    } else {
      list.back() += c;
    }
  }
  return list;
}

TEST(BenchAttention, JsonSaysWhatRanWhereAndHowWell) {
  const e2e::Result r = e2e::snapmla(attention({"-o", "json"}));
  ASSERT_EQ(r.status, 0) << r.err;
  const Json report = Json::parse(r.out);
  EXPECT_THAT(report["command"], HasSubstr("bench attention --heads 3,8"));
  EXPECT_FALSE(report["version"].get<std::string>().empty());
  EXPECT_FALSE(report["machine"]["cpu"].get<std::string>().empty());
  EXPECT_EQ(report["machine"]["threads"], 2);
  EXPECT_GT(report["limits"]["fma_gflops"], 0.1);
  EXPECT_GT(report["limits"]["memory_gbytes_per_s"], 0.1);
  const Json& rows = report["results"];
  ASSERT_EQ(rows.size(), 4u);  // two formats, two head counts
  const auto count = [&](const char* key, const Json& value) {
    return std::count_if(rows.begin(), rows.end(), [&](const Json& x) { return x[key] == value; });
  };
  EXPECT_EQ(count("kv_cache", "fp8"), 2);
  EXPECT_EQ(count("kv_cache", "bf16"), 2);
  EXPECT_EQ(count("heads", 3), 2);
  for (const Json& row : rows) {
    const double ms = row["ms"];
    EXPECT_LE(row["ms_min"], ms);
    EXPECT_LE(row["ms_p20"], ms);
    EXPECT_GE(row["ms_p80"], ms);
    EXPECT_GE(row["samples"], 2);
    EXPECT_LT(row["error"], 2e-3);
    // 2 requests; the two new tokens see 99 and 100 keys; 2 * (576 + 512) per row and key.
    const double flops = 2.0 * 199 * row["heads"].get<double>() * 2 * 1088;
    EXPECT_NEAR(row["GFLOP/s"].get<double>(), flops / ms / 1e6, 1e-6 * flops / ms / 1e6);
    const double bytes = 200.0 * (row["kv_cache"] == "fp8" ? 644 : 1152);
    EXPECT_NEAR(row["GB/s"].get<double>(), bytes / ms / 1e6, 1e-6 * bytes / ms / 1e6);
    EXPECT_NEAR(row["tok/s"].get<double>(), 4 / ms * 1e3, 1e-6 * 4 / ms * 1e3);
    EXPECT_EQ(row["bound"] == "fma", row["fma%"].get<double>() >= row["mem%"].get<double>());
  }
}

TEST(BenchAttention, CsvHasOneLineOfEqualLengthPerShape) {
  const e2e::Result r = e2e::snapmla(attention({"-o", "csv", "--kv-cache", "fp8"}));
  ASSERT_EQ(r.status, 0) << r.err;
  const Words lines = e2e::lines(r.out);
  ASSERT_EQ(lines.size(), 3u);
  const Words head = fields(lines[0]);
  EXPECT_THAT(head, ::testing::IsSupersetOf({"kv_cache", "heads", "context", "ms", "bound%"}));
  const auto column = [&](const char* key) {
    return static_cast<std::size_t>(std::find(head.begin(), head.end(), key) - head.begin());
  };
  for (std::size_t i = 1; i < lines.size(); ++i) {
    const Words row = fields(lines[i]);
    ASSERT_EQ(row.size(), head.size());
    EXPECT_EQ(row[column("kv_cache")], "fp8");
    EXPECT_EQ(row[column("heads")], i == 1 ? "3" : "8");
    EXPECT_GT(std::stod(row[column("ms")]), 0);
  }
}

TEST(BenchAttention, MarkdownAndTableAreAligned) {
  for (const char* form : {"md", "table"}) {
    const e2e::Result r = e2e::snapmla(attention({"-o", form, "--kv-cache", "bf16"}));
    ASSERT_EQ(r.status, 0) << r.err;
    const Words lines = e2e::lines(r.out);
    ASSERT_GE(lines.size(), 4u);
    for (std::size_t i = 1; i < 4; ++i) EXPECT_EQ(lines[i].size(), lines[0].size()) << lines[i];
    const bool bars = std::all_of(lines.begin(), lines.begin() + 4, [](const std::string& line) {
      return line.front() == '|' && line.back() == '|';
    });
    EXPECT_EQ(bars, std::string(form) == "md");
    EXPECT_THAT(r.out, HasSubstr("limits measured in this run"));
  }
}

TEST(BenchAttention, TheReferenceIsCheckedAgainstFp64) {
  const e2e::Result r =
      e2e::snapmla({"bench", "attention", "--device", "ref", "--heads", "1", "--context", "70",
                    "--min-time", "0", "-r", "1", "-o", "json"});
  ASSERT_EQ(r.status, 0) << r.err;
  const Json rows = Json::parse(r.out)["results"];
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_GT(rows[0]["error"], 1e-4) << "P is quantised in an FP8 cache";
  EXPECT_LT(rows[1]["error"], 1e-5);
}

TEST(BenchGenerate, JsonHasEveryTestWithItsSamples) {
  const e2e::Result r = e2e::snapmla({"bench", "generate", "-p", "16", "-n", "4", "-d", "0,8", "-r",
                                      "2", "--kv-cache", "fp8,bf16", "-t", "1", "-o", "json"});
  ASSERT_EQ(r.status, 0) << r.err;
  const Json report = Json::parse(r.out);
  EXPECT_EQ(report["model"]["name"], "snapmla-20m");
  EXPECT_GT(report["model"]["weight_bytes"], 1000000);
  Words tests;
  for (const Json& row : report["results"]) {
    tests.push_back(row["kv_cache"].get<std::string>() + " " + row["test"].get<std::string>());
    EXPECT_EQ(row["threads"], 1);
    ASSERT_EQ(row["samples"].size(), 2u);
    const double a = row["samples"][0], b = row["samples"][1];
    EXPECT_NEAR(row["t/s"].get<double>(), (a + b) / 2, 1e-6 * (a + b));
    EXPECT_GT(std::min(a, b), 0);
  }
  EXPECT_EQ(tests, (Words{"fp8 pp16", "fp8 tg4", "fp8 tg4 @ d8", "bf16 pp16", "bf16 tg4",
                          "bf16 tg4 @ d8"}));
}

TEST(BenchAttention, AutoIsADeviceAndF32ACache) {
  const e2e::Result r =
      e2e::snapmla({"bench", "attention", "--device", "auto", "--kv-cache", "f32", "--heads", "2",
                    "--context", "70", "--min-time", "0", "-r", "1", "-t", "1", "-o", "json"},
                   {.extra_env = {"SNAPMLA_BACKEND=cpu"}});
  ASSERT_EQ(r.status, 0) << r.err;
  const Json rows = Json::parse(r.out)["results"];
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_EQ(rows[0]["device"], "cpu");
  EXPECT_EQ(rows[0]["kv_cache"], "f32");
  EXPECT_LT(rows[0]["error"], 1e-5);
  const double bytes = 70.0 * (512 + 64) * 4, ms = rows[0]["ms"];
  EXPECT_NEAR(rows[0]["GB/s"].get<double>(), bytes / ms / 1e6, 1e-6 * bytes / ms / 1e6);
}

TEST(BenchAttention, OptionsOfTheOtherDeviceAreRefused) {
  const std::string file = e2e::fresh_directory() + "/x.json";
  const std::vector<Words> gpu = {{"--preset", "quick"}, {"--ragged"},    {"--p-block", "64"},
                                  {"--deterministic"},   {"--no-extras"}, {"--rounds", "2"},
                                  {"--idle", "0"},       {"--load", "0"}, {"--sustained", "1"},
                                  {"--json", file},      {"--csv", file}};
  const std::vector<Words> host = {
      {"--threads", "1"}, {"--repetitions", "1"}, {"--min-time", "0"}, {"--output", "json"}};
  const auto refused = [](const Words& option, const std::string& device, const std::string& says) {
    Words words = {"bench", "attention", "--device", device};
    words.insert(words.end(), option.begin(), option.end());
    const e2e::Result r = e2e::snapmla(words, {.extra_env = {"SNAPMLA_BACKEND=cpu"}});
    EXPECT_EQ(r.status, 2) << option[0] << ": " << r.err;
    EXPECT_EQ(r.out, "");
    EXPECT_EQ(r.err, "snapmla: error: " + option[0] + ": " + says +
                         "\nTry 'snapmla bench attention --help'.\n");
  };
  for (const Words& option : gpu) {
    refused(option, "cpu", "got --device cpu, accepted only with --device cuda");
    refused(option, "auto", "got --device auto (here cpu), accepted only with --device cuda");
  }
  for (const Words& option : host) {
    refused(option, "cuda", "got --device cuda, accepted only with --device cpu or ref");
  }
}

TEST(BenchHelp, HasTypesDefaultsAndExamplesOfItsOwn) {
  const std::vector<std::pair<Words, Words>> pages = {
      {{"bench", "--help"}, {"snapmla bench attention --heads"}},
      {{"bench", "attention", "--help"},
       {"--heads N,...", "(default: 8,16)", "(default: 1024,8192,32768)", "(default: fp8,bf16)",
        "--device NAME", "(default: cpu)", "(default: 0.5)", "(default: table)",
        "Only with --device cuda", "--preset NAME", "--json FILE", "(default: 128)",
        "  snapmla bench attention --heads 8,16"}},
      {{"bench", "generate", "--help"},
       {"--model DIR", "(default: 512)", "(default: fp8)", "(default: auto)", "(default: 5)",
        "  snapmla bench generate -p 512"}}};
  for (const auto& [args, words] : pages) {
    const e2e::Result r = e2e::snapmla(args);
    EXPECT_EQ(r.status, 0);
    for (const std::string& word : words) EXPECT_THAT(r.out, HasSubstr(word));
    for (const char* word : {"snapmla run", " INT", " TEXT", " FLOAT", ":{", " in ["}) {
      EXPECT_THAT(r.out, ::testing::Not(HasSubstr(word))) << args[1];
    }
    for (const std::string& line : e2e::lines(r.out)) EXPECT_LE(line.size(), 96u) << line;
  }
}

struct Mistake {
  Words words;
  int status;
  std::string says;
};

TEST(Bench, WrongArgumentsGiveOneError) {
  const std::vector<Mistake> mistakes = {
      {{"bench"}, 2, "subcommand"},
      {{"bench", "attention", "--heads", "0"}, 2, "1 to 128"},
      {{"bench", "attention", "--heads", "8,129"}, 2, "1 to 128"},
      {{"bench", "attention", "--heads", "many"}, 2, "many"},
      {{"bench", "attention", "--seqlen-q", "17"}, 2, "1 to 16"},
      {{"bench", "attention", "--kv-cache", "fp8,int4"}, 2, "int4"},
      {{"bench", "attention", "-o", "xml"}, 2, "xml"},
      {{"bench", "attention", "--min-time", "-1"}, 2, "0 to 3600"},
      {{"bench", "attention", "--device", "tpu"},
       2,
       "got 'tpu', accepted are auto, cpu, cuda, ref"},
      {{"bench", "generate", "--device", "tpu"}, 2, "got 'tpu', accepted are auto, cpu, cuda, ref"},
      {{"bench", "generate", "--kv-cache", "int4"}, 2, "accepted are fp8, bf16, f32"},
      {{"bench", "attention", "--kv-cache", "int4"}, 2, "accepted are fp8, bf16, f32"},
      {{"bench", "attention", "--kv-cache", "f32", "--device", "cuda"},
       2,
       "--kv-cache: got 'f32', accepted with --device cuda are fp8, bf16"},
      {{"bench", "attention", "--preset", "quick", "--heads", "8"}, 2, "excludes"},
      {{"bench", "attention", "--seqlen-q", "4", "--context", "3"}, 1, "at least seqlen-q"},
      {{"bench", "attention", "-b", "65536", "--context", "16000000"}, 1, "MiB are available"},
      {{"bench", "generate", "-p", "-1"}, 2, "-1"},
      {{"bench", "generate", "-p", "0", "-n", "0"}, 1, "at least one"},
      {{"bench", "generate", "-p", "20000"}, 1, "at most 16384"},
      {{"bench", "generate", "-p", "0", "-n", "100", "-d", "16300"}, 1, "at most 16384"},
      {{"bench", "generate", "--model", "/nonexistent"}, 1, "/nonexistent"},
  };
  for (const Mistake& m : mistakes) {
    const e2e::Result r = e2e::snapmla(m.words);
    EXPECT_EQ(r.status, m.status) << m.words.back() << ": " << r.err;
    EXPECT_THAT(r.err, HasSubstr(m.says)) << m.words.back();
    EXPECT_EQ(r.out, "") << m.words.back();
    if (m.status == 2 && m.words.size() > 1) {
      EXPECT_THAT(r.err, HasSubstr("Try 'snapmla bench " + m.words[1] + " --help'"));
    }
  }
}

}  // namespace
}  // namespace snapmla
