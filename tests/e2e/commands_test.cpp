// snapmla logits, inspect and --help; wrong usage.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "e2e/process.h"
#include "model/safetensors.h"
#include "snapmla/snapmla.h"

namespace snapmla::e2e {
namespace {

using testing::ContainsRegex;
using testing::HasSubstr;

const std::vector<std::int32_t> kTokens = {0, 307, 12, 99, 2047, 5, 5, 81, 1000, 44, 3};

std::string listed(const std::vector<std::int32_t>& tokens, const std::string& separator) {
  std::string text;
  for (std::int32_t id : tokens) text += (text.empty() ? "" : separator) + std::to_string(id);
  return text;
}

// The file holds exactly these logits for exactly these tokens.
void expect_file(const std::string& path, const std::vector<std::int32_t>& tokens,
                 const std::vector<float>& want) {
  const model::SafetensorsFile file(path);
  const TensorView logits = file.tensors().at("logits"), ids = file.tensors().at("tokens");
  ASSERT_EQ(ids.numel(), static_cast<std::int64_t>(tokens.size()));
  EXPECT_EQ(std::memcmp(ids.raw(), tokens.data(), tokens.size() * 4), 0);
  ASSERT_EQ(logits.rank(), 2);
  ASSERT_EQ(logits.dim(0), ids.numel());
  ASSERT_EQ(logits.numel(), static_cast<std::int64_t>(want.size()));
  EXPECT_EQ(std::memcmp(logits.raw(), want.data(), want.size() * 4), 0);
}

class Logits : public testing::Test {
 protected:
  Engine engine(KvCacheFormat format) {
    EngineOptions options;
    options.model_dir = shipped_model();
    options.kv_cache = format;
    options.max_model_len = 256;
    return Engine(options);
  }
  void write(const std::vector<std::string>& flags) {
    std::vector<std::string> args = {"logits", "-o", path_, "-m", shipped_model()};
    args.insert(args.end(), flags.begin(), flags.end());
    const Result r = snapmla(args);
    ASSERT_EQ(r.status, 0) << r.err;
    EXPECT_EQ(r.out + r.err, "");
  }
  const std::string dir_ = fresh_directory(), path_ = dir_ + "/logits.safetensors";
};

TEST_F(Logits, OfListedTokensAreTheLibrarysBitForBit) {
  write({"--tokens", listed(kTokens, ",")});
  expect_file(path_, kTokens, engine(KvCacheFormat::kFp8).logits(kTokens));
}

TEST_F(Logits, OfTokensInAFileOnABf16Cache) {
  std::ofstream(dir_ + "/ids") << listed(kTokens, ",\n ") << "\n";
  write({"--tokens", "@" + dir_ + "/ids", "--kv-cache", "bf16"});
  expect_file(path_, kTokens, engine(KvCacheFormat::kBf16).logits(kTokens));
}

TEST_F(Logits, OfAText) {
  write({"-p", "import os\n"});
  Engine library = engine(KvCacheFormat::kFp8);
  const std::vector<std::int32_t> ids = library.encode("import os\n");
  expect_file(path_, ids, library.logits(ids));
}

TEST_F(Logits, ThroughDecodeFourTokensPerStep) {
  write({"--tokens", listed(kTokens, ","), "--decode", "4"});
  Engine library = engine(KvCacheFormat::kFp8);
  expect_file(path_, kTokens, library.decode_logits(kTokens, 1, 4));
  EXPECT_NE(library.decode_logits(kTokens, 1, 4), library.logits(kTokens));
}

TEST_F(Logits, AnIdOutsideTheVocabularyIsAnError) {
  const Result r = snapmla({"logits", "--tokens", "0,2048", "-o", path_, "-m", shipped_model()});
  EXPECT_EQ(r.status, 1);
  EXPECT_THAT(r.err, HasSubstr("token 1 is 2048, accepted are 0 to 2047"));
}

TEST_F(Logits, AFileThatCannotBeWrittenIsAnError) {
  const Result r =
      snapmla({"logits", "--tokens", "0", "-o", dir_ + "/no/such/dir", "-m", shipped_model()});
  EXPECT_EQ(r.status, 1);
  EXPECT_THAT(r.err, HasSubstr("/no/such/dir: cannot be written"));
}

TEST_F(Logits, AFieldWithoutAnIdIsAnError) {
  for (const char* ids : {"1,,2", ",1", "1,", "1, ,2", "1,\n,2", ","}) {
    const Result r = snapmla({"logits", "--tokens", ids, "-o", path_, "-m", shipped_model()});
    EXPECT_EQ(r.status, 1) << ids;
    EXPECT_EQ(lines(r.err).size(), 1u) << r.err;
    EXPECT_THAT(r.err, ContainsRegex("--tokens: token [01]: got '', accepted are token ids"));
    EXPECT_FALSE(std::filesystem::exists(path_)) << ids;
  }
}

TEST_F(Logits, TokensInADirectoryAreAnErrorThatNamesIt) {
  const Result r = snapmla({"logits", "--tokens", "@" + dir_, "-o", path_, "-m", shipped_model()});
  EXPECT_EQ(r.status, 1);
  EXPECT_EQ(r.err, "snapmla: error: " + dir_ + ": cannot be read: Is a directory\n");
}

TEST(Inspect, ShippedModel) {
  const Result r = snapmla({"inspect", "-m", shipped_model(), "--memory", "1,80"});
  EXPECT_EQ(r.status, 0);
  EXPECT_THAT(r.out, ContainsRegex("architecture +DeepseekV3ForCausalLM \\(deepseek_v3\\)\n"));
  EXPECT_THAT(r.out, ContainsRegex("layers +5 \\+ 1 MTP\n"));
  EXPECT_THAT(r.out, ContainsRegex("bytes per token +5760 +3220\n"));
  EXPECT_THAT(r.out, ContainsRegex("bytes per page of 64 +368640 +206080\n"));
  // floor(2^30 / bytes per page) * 64
  EXPECT_THAT(r.out, ContainsRegex("tokens in 1 GiB +186368 +333440\n"));
  EXPECT_THAT(r.out, ContainsRegex("tokens in 80 GiB +14913024 +26676800\n"));
}

TEST(Inspect, EveryKindOfCheckpoint) {
  for (const char* name : {"o1", "o2", "o3", "o4", "o6"}) {
    const Result r = snapmla({"inspect", SNAPMLA_SOURCE_DIR "/tests/oracles/" + std::string(name)});
    EXPECT_EQ(r.status, 0) << name << ": " << r.err;
    EXPECT_THAT(r.out, HasSubstr("bytes per token")) << name;
  }
}

TEST(Help, EveryCommandHasOneThatFitsTheScreen) {
  const std::vector<std::pair<std::vector<std::string>, std::vector<std::string>>> pages = {
      {{"--help"},
       {"run", "logits", "inspect", "Examples:", "Exit status", "SNAPMLA_BACKEND",
        "SNAPMLA_MODEL_DIR"}},
      {{"run", "--help"},
       {"--prompt", "--chat", "--system", "--compare", "--max-tokens", "--temperature", "--top-p",
        "--kv-cache", "--kv-rounding", "--device", "Sampling:", "Model:", "Examples:"}},
      {{"logits", "--help"}, {"--tokens", "@FILE", "--prompt", "--output", "--decode", "Example"}},
      {{"inspect", "--help"},
       {"--model", "--memory", "--cache", "Cache analysis:", "--prompt", "--file", "--tokens",
        "--output", "--svg", "--kv-cache", "--device", "--threads", "Examples:"}}};
  for (const auto& [args, words] : pages) {
    const Result r = snapmla(args);
    EXPECT_EQ(r.status, 0);
    EXPECT_EQ(r.err, "");
    for (const std::string& word : words) EXPECT_THAT(r.out, HasSubstr(word)) << args[0];
    for (const std::string& line : lines(r.out)) EXPECT_LE(line.size(), 96u) << line;
  }
  EXPECT_EQ(snapmla({"--version"}).out, "snapmla " SNAPMLA_VERSION "\n");
}

TEST(Usage, MistakesAreTwoLinesAndStatus2) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> mistakes = {
      {{"bogus"}, "got 'bogus', accepted are the commands"},
      {{"run", "--bogus"}, "got '--bogus', accepted are the options"},
      {{"run", "-p", "x", "stray"}, "got 'stray'"},
      {{"run", "--temp", "-1"}, "--temp: got '-1', accepted is a finite number >= 0"},
      {{"run", "--temp", "nan"}, "--temp: got 'nan'"},
      {{"run", "--temp", "inf"}, "--temp: got 'inf'"},
      {{"run", "--temp", ""}, "--temp: got ''"},
      {{"run", "--top-p", "0"}, "--top-p: got '0', accepted is a number with 0 < P <= 1"},
      {{"run", "--top-p", "1.01"}, "--top-p: got '1.01'"},
      {{"run", "--min-p", "1"}, "--min-p: got '1', accepted is a number with 0 <= P < 1"},
      {{"run", "--top-k", "-1"}, "--top-k: got '-1', accepted is an integer from 0"},
      {{"run", "--top-k", "2.5"}, "--top-k: got '2.5'"},
      {{"run", "-n", "0"}, "--max-tokens: got '0', accepted is an integer from 1"},
      {{"run", "-n", "99999999999"}, "--max-tokens: got '99999999999'"},
      {{"run", "-s", "-3"}, "--seed: got '-3'"},
      {{"run", "-t", "0"}, "--threads: got '0'"},
      {{"run", "-t", "4097"}, "--threads: got '4097', accepted is an integer from 1 to 4096"},
      {{"run", "-c", "-5"}, "--max-model-len: got '-5'"},
      {{"run", "--kv-cache", "int4"}, "--kv-cache: got 'int4', accepted are fp8, bf16, f32"},
      {{"logits", "--tokens", "1", "--kv-rounding", "up"},
       "--kv-rounding: got 'up', accepted are nearest, feedback"},
      {{"run", "--device", "tpu"}, "--device: got 'tpu', accepted are auto, cpu, cuda, ref"},
      {{"run", "-p", "x", "--stop", ""}, "--stop: got '', accepted is a text of at least 1 byte"},
      {{"logits", "--tokens", "0", "-o", "-"}, "--output: got '-', accepted is a file's name"},
      {{"run", "--system", "x"}, "--system requires --chat"},
      {{"run", "--chat", "--compare"}, "--chat excludes --compare"},
      {{"run", "-p", "x", "--compare", "--kv-cache", "f32"}, "--compare excludes --kv-cache"},
      {{"logits", "-o", "x"}, "--tokens IDS or --prompt TEXT is required"},
      {{"logits", "--tokens", "0"}, "--output is required"},
      {{"logits", "--tokens", "0", "-o", "x", "--decode", "17"}, "--decode: got '17'"},
      {{"inspect", "--memory", "0"}, "--memory: got '0', accepted is a number of GiB > 0"},
      {{"inspect", "--svg", "x.svg"}, "--svg requires --cache"},
      {{"inspect", "-p", "x"}, "--prompt requires --cache"},
      {{"inspect", "--cache", "--memory", "1"}, "--cache excludes --memory"},
      {{"inspect", "--cache", "-p", "x", "-f", "y"}, "--prompt excludes --file"},
      {{"inspect", "--cache", "--tokens", "0"}, "--tokens: got '0', accepted is an integer from 1"},
      {{"inspect", "--cache", "-o", "csv"}, "--output: got 'csv', accepted are table, json, md"},
      {{"inspect", "--cache", "--kv-cache", "fp8"},
       "--kv-cache: got 'fp8', accepted are f32, bf16"},
  };
  for (const auto& [args, message] : mistakes) {
    const Result r = snapmla(args);
    EXPECT_EQ(r.status, 2) << message;
    EXPECT_EQ(r.out, "") << message;
    EXPECT_EQ(lines(r.err).size(), 2u) << r.err;
    EXPECT_THAT(r.err, testing::StartsWith("snapmla: error: " + message));
    EXPECT_THAT(r.err, HasSubstr("--help'.\n"));
  }
}

// Threads that the system does not start are an error, not the end of the process.
TEST(Usage, MoreThreadsThanTheSystemStartsIsOneErrorLine) {
  if (sanitized()) GTEST_SKIP() << "the sanitizer needs the address space that is limited here";
  const Result r = snapmla({"run", "-p", "x", "-n", "1", "-t", "4096", "-m", shipped_model()},
                           {.address_space = std::int64_t{1} << 30});
  EXPECT_EQ(r.status, 1);
  EXPECT_EQ(r.out, "");
  EXPECT_THAT(r.err, testing::MatchesRegex("snapmla: error: threads: got 4096, accepted are at "
                                           "most the [0-9]+ that the system starts[^\n]*\n"));
}

// A full disk: what was not written is no success, for printf, for streams and for CLI11's help.
TEST(Output, ThatCannotBeWrittenIsAnError) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "this machine has no /dev/full";
  const std::vector<std::vector<std::string>> commands = {
      {"inspect", "-m", shipped_model()},
      {"inspect", "--cache", "-p", "import", "-m", shipped_model()},
      {"run", "-p", "import numpy as", "-n", "4", "-m", shipped_model()},
      {"run", "-p", "import numpy as", "-n", "4", "--compare", "-m", shipped_model()},
      {"run", "-p", "hello", "-n", "4", "--chat", "-m", shipped_model()},
      {"bench", "attention", "--heads", "8", "-b", "1", "-c", "64", "-r", "1", "-o", "json"},
      {"--help"},
      {"inspect", "--help"},
      {"--version"},
      {}};
  for (const std::vector<std::string>& args : commands) {
    const std::string name = testing::PrintToString(args);
    const Result r = snapmla(args, {.output_to = "/dev/full"});
    EXPECT_EQ(r.status, 1) << name << r.err;
    EXPECT_THAT(r.err, testing::EndsWith("snapmla: error: standard output: cannot be written\n"))
        << name;
    // The same without the fault, which is then the reason.
    if (args.size() > 2) {
      EXPECT_EQ(snapmla(args).status, 0) << name;
    }
  }
}

// An error that was reported already stays the only one.
TEST(Output, ThatCannotBeWrittenKeepsAnEarlierError) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "this machine has no /dev/full";
  EXPECT_EQ(snapmla({"run", "--bogus"}, {.output_to = "/dev/full"}).status, 2);
  const Result r = snapmla({"inspect", "-m", "/no/such/model"}, {.output_to = "/dev/full"});
  EXPECT_EQ(r.status, 1);
  EXPECT_EQ(lines(r.err).size(), 1u) << r.err;
}

// No reader ever comes back to a full disk, so there is nothing to write the rest for.
TEST(Output, ThatCannotBeWrittenEndsTheText) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "this machine has no /dev/full";
  const Result r =
      snapmla({"run", "-p", "import os", "-n", "15000", "--ignore-eos", "-m", shipped_model()},
              {.output_to = "/dev/full"});
  EXPECT_EQ(r.status, 1);
  EXPECT_THAT(r.err, ContainsRegex("generated [0-9]{1,2} tokens"));
}

// `snapmla ... | head -1` ends as other programs do.
TEST(Output, AClosedPipeIsSigpipe) {
  const Result r =
      run_program("/bin/bash", {"-c",
                                "\"$0\" run -p 'import os' -n 15000 -m \"$1\" | head -c 1; "
                                "exit ${PIPESTATUS[0]}",
                                SNAPMLA_BINARY, shipped_model()});
  EXPECT_EQ(r.status, 128 + SIGPIPE) << r.err;
}

}  // namespace
}  // namespace snapmla::e2e
