// snapmla run and the demo, on the shipped model, against the goldens made with transformers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>

#include "e2e/process.h"
#include "model/safetensors.h"
#include "model/tokenizer.h"

namespace snapmla::e2e {
namespace {

using testing::ContainsRegex;
using testing::HasSubstr;
using testing::MatchesRegex;

// Prompt i of tests/oracles/o8 as text without the BOS, and its 64 greedy tokens as text.
struct Golden {
  std::string prompt, text;
  explicit Golden(std::size_t i) {
    const std::string dir = SNAPMLA_SOURCE_DIR "/tests/oracles/o8";
    std::ifstream meta(dir + "/meta.json");
    prompt = nlohmann::json::parse(meta).at("prompts").at(i).at("prompt").get<std::string>();
    const std::string bos = "<｜begin▁of▁sentence｜>";
    EXPECT_TRUE(prompt.starts_with(bos));
    prompt.erase(0, bos.size());
    const model::SafetensorsFile file(dir + "/golden.safetensors");
    const auto* ids =
        file.tensors().at("greedy.ids").row<std::int32_t>(static_cast<std::int64_t>(i));
    text = Tokenizer::load(shipped_model()).decode(std::span(ids, 64));
  }
};

const std::vector<std::string> kGreedy = {"-n", "64", "--ignore-eos", "--kv-cache", "f32"};

std::vector<std::string> with(std::vector<std::string> args, const std::vector<std::string>& more) {
  args.insert(args.end(), more.begin(), more.end());
  return args;
}

TEST(Run, GreedyTextIsTheGoldenTextFromAFlag) {
  const Golden golden(0);
  const Result r = snapmla(with({"run", "-p", golden.prompt}, kGreedy));
  EXPECT_EQ(r.status, 0);
  EXPECT_EQ(r.out, golden.text + "\n");
  EXPECT_THAT(r.err, MatchesRegex("\\[[a-z]+, f32 cache\\] prompt 123 tokens, [0-9.]+ tok/s \\| "
                                  "generated 64 tokens, [0-9.]+ tok/s \\| cache [0-9]+ bytes "
                                  "\\([0-9]+ per token\\)\n"));
}

TEST(Run, GreedyTextIsTheGoldenTextFromStandardInput) {
  const Golden golden(6);
  const Result r = snapmla(with({"run"}, kGreedy), {.input = golden.prompt});
  EXPECT_EQ(r.status, 0);
  EXPECT_EQ(r.out, golden.text + "\n");
}

// The smallest margin of this prompt is far above what the FP8 cache changes.
TEST(Run, GreedyTextIsTheGoldenTextFromAFileAndAnFp8Cache) {
  const Golden golden(1);
  const std::string file = fresh_directory() + "/prompt.txt";
  std::ofstream(file) << golden.prompt;
  const Result r = snapmla({"run", "--file", file, "-n", "64", "--ignore-eos"});
  EXPECT_EQ(r.status, 0);
  EXPECT_EQ(r.out, golden.text + "\n");
  EXPECT_THAT(r.err, HasSubstr("fp8 cache] prompt 849 tokens"));
  // 913 tokens are 15 pages of 5 layers.
  EXPECT_THAT(r.err, HasSubstr("cache " + std::to_string(15 * 5 * 41216) + " bytes (3220 per"));
}

TEST(Run, StopTextEndsTheTextBeforeIt) {
  const Golden golden(0);
  const std::string stop = "count_words";
  const Result r = snapmla(with({"run", "-p", golden.prompt, "--stop", stop}, kGreedy));
  EXPECT_EQ(r.status, 0);
  EXPECT_EQ(r.out, golden.text.substr(0, golden.text.find(stop)) + "\n");
}

TEST(Run, SamplingRepeatsWithItsSeedOnly) {
  const auto text = [](const std::string& seed) {
    return snapmla({"run", "-p", "import ", "--temp", "1", "-n", "24", "-s", seed}).out;
  };
  const std::string first = text("7");
  EXPECT_EQ(text("7"), first);
  EXPECT_NE(text("8"), first);
}

// A copy of the shipped model whose author recommends sampling.
TEST(Run, SamplingDefaultsComeFromTheCheckpointAndFlagsWin) {
  namespace fs = std::filesystem;
  const fs::path dir = fresh_directory();
  for (const auto& entry : fs::directory_iterator(shipped_model())) {
    fs::create_symlink(entry.path(), dir / entry.path().filename());
  }
  fs::remove(dir / "generation_config.json");
  const auto text = [&](const std::vector<std::string>& flags) {
    const Result r = snapmla(with({"run", "-m", dir.string(), "-p", "import ", "-n", "24"}, flags));
    EXPECT_EQ(r.status, 0) << r.err;
    return r.out;
  };
  const std::string greedy = text({});
  const std::string sampled = text({"--temp", "1.5", "--top-k", "40"});
  ASSERT_NE(sampled, greedy);
  const auto recommend = [&](const std::string& json) {
    std::ofstream(dir / "generation_config.json") << json;
  };
  recommend(R"({"do_sample": true, "temperature": 1.5, "top_k": 40})");
  EXPECT_EQ(text({}), sampled);
  EXPECT_EQ(text({"--temp", "0"}), greedy);
  EXPECT_EQ(text({"--top-k", "1"}), greedy);
  recommend(R"({"do_sample": false, "temperature": 1.5, "top_k": 40})");
  EXPECT_EQ(text({}), greedy);
  recommend(R"({"temperature": -1})");
  const Result r = snapmla({"run", "-m", dir.string(), "-p", "x"});
  EXPECT_EQ(r.status, 1);
  EXPECT_THAT(r.err, HasSubstr("generation_config.json: temperature: got -1"));
}

TEST(Compare, TheDemosLedgerIsRightFromBothCaches) {
  const Result r = snapmla({}, {.extra_env = {"SNAPMLA_MODEL_DIR=" + shipped_model()}});
  EXPECT_EQ(r.status, 0);
  EXPECT_THAT(r.out, ContainsRegex("step +BF16 cache +FP8 cache *\n"));
  EXPECT_THAT(r.out, HasSubstr("lines      right: BF16 16 of 16, FP8 16 of 16\n"));
  EXPECT_THAT(r.out, testing::Not(HasSubstr("wrong")));
  EXPECT_THAT(r.out, HasSubstr("tokens     identical, all 385\n"));
  EXPECT_THAT(r.out, ContainsRegex("logits     on the BF16 text, 589 positions: same top token "
                                   "[0-9.]+%, cosine 0\\.9999[0-9]+"));
  EXPECT_THAT(r.out, HasSubstr("(5760 and 3220 per token): 1.789x smaller"));
}

// Hot sampling with one seed turns the small difference of the caches into another token.
TEST(Compare, ShowsWhereTheTextsPart) {
  const Result r =
      snapmla({"run", "--compare", "-p", "class Stack:", "--temp", "1.2", "-s", "1", "-n", "40"});
  EXPECT_EQ(r.status, 0);
  EXPECT_THAT(r.out, ContainsRegex("tokens     part at generated token [0-9]+ of [0-9]+\n"
                                   " +after \"[^\n]+\"\n"
                                   " +BF16  \"[^\n]*\" \\(id [0-9]+\\), then \"[^\n]*\"\n"
                                   " +FP8   \"[^\n]*\" \\(id [0-9]+\\), then \"[^\n]*\"\n"
                                   " +logits of ids [0-9]+, [0-9]+: BF16 "));
}

TEST(Run, CtrlCEndsTheTextAndKeepsTheClosingLine) {
  bool sent = false;
  const Launch launch{.on_output = [&](int pid, const std::string& seen) {
    if (!sent && seen.size() > 40) sent = kill(pid, SIGINT) == 0;
    return std::string();
  }};
  const Result r = snapmla({"run", "-p", "def f():", "-n", "15000", "--ignore-eos"}, launch);
  EXPECT_EQ(r.status, 130);
  EXPECT_GT(r.out.size(), 40u);
  EXPECT_THAT(r.err, ContainsRegex("generated [0-9]+ tokens"));
}

// The weights are mapped while the text is written.
TEST(Run, AWeightFileThatIsCutShortMeanwhileIsOneClearError) {
  namespace fs = std::filesystem;
  const fs::path dir = fresh_directory();
  fs::copy(shipped_model(), dir);
  bool cut = false;
  const Launch launch{.on_output = [&](int, const std::string& seen) {
    if (!cut && seen.size() > 20) {
      fs::resize_file(dir / "model-00001-of-00002.safetensors", 8192);
      cut = true;
    }
    return std::string();
  }};
  const Result r =
      snapmla({"run", "-m", dir.string(), "-p", "def f():", "-n", "15000", "--ignore-eos"}, launch);
  EXPECT_EQ(r.status, 1);
  EXPECT_EQ(lines(r.err).size(), 1u) << r.err;
  EXPECT_THAT(r.err, HasSubstr("model-00001-of-00002.safetensors: the file changed"));
}

TEST(Run, APromptFileThatCannotBeReadIsNamed) {
  const std::string dir = fresh_directory();
  for (const auto& [file, why] :
       {std::pair{dir, "Is a directory"}, std::pair{dir + "/none", "No such file or directory"}}) {
    const Result r = snapmla({"run", "-f", file, "-m", shipped_model()});
    EXPECT_EQ(r.status, 1);
    EXPECT_EQ(r.err, "snapmla: error: " + file + ": cannot be read: " + why + "\n");
  }
}

// What the shell makes of -f <(command).
TEST(Run, APromptFileMayBeAPipe) {
  const Result r = snapmla({"run", "-f", "/dev/stdin", "-n", "4", "-m", shipped_model()},
                           {.input = "import numpy as"});
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_EQ(r.out, snapmla({"run", "-p", "import numpy as", "-n", "4", "-m", shipped_model()}).out);
}

// 99999999 tokens in pages of 64 are 1562500 pages of 5 layers x 41216 bytes.
TEST(Run, ACacheThatDoesNotFitSaysHowLargeItIsAndWhatSetsIt) {
  if (sanitized()) GTEST_SKIP() << "the sanitizer needs the address space that is limited here";
  const Result r = snapmla({"run", "-p", "x", "-n", "1", "-c", "99999999", "-m", shipped_model()},
                           {.address_space = std::int64_t{2} << 30});
  EXPECT_EQ(r.status, 1);
  EXPECT_EQ(lines(r.err).size(), 1u) << r.err;
  EXPECT_THAT(r.err, ContainsRegex("cache pool of 99999999 tokens.*322000000000 bytes.*"
                                   "--max-model-len"));
}

TEST(Run, CudaWithoutAGpuSaysWhy) {
  if (std::filesystem::exists("/dev/nvidiactl")) GTEST_SKIP() << "this machine has a GPU";
  const Result r = snapmla({"run", "-p", "x", "--device", "cuda"});
  EXPECT_EQ(r.status, 1);
  EXPECT_EQ(r.out, "");
  EXPECT_EQ(lines(r.err).size(), 1u) << r.err;
  EXPECT_THAT(r.err, ContainsRegex("snapmla: error: .*(cuda|CUDA)"));
}

}  // namespace
}  // namespace snapmla::e2e
