// Whole evaluations of the shipped model, small ones.
#include "quality/evaluation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "quality/report.h"
#include "snapmla/error.h"
#include "support/source_dir.h"

namespace snapmla::quality {
namespace {

using Json = Journal::Json;

class Quality : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = std::filesystem::temp_directory_path() /
           ("snapmla-eval-" + std::to_string(getpid()) + "-" +
            testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  Settings settings(const std::vector<std::string>& arms) const {
    const std::filesystem::path model = source_dir() / "models/snapmla-20m";
    Settings s;
    s.model_dir = model.string();
    s.device = "cpu";
    s.threads = 2;
    s.arms = arms;
    s.text_file = (model / "eval/text.jsonl").string();
    s.contexts = {192};
    s.text_tokens = 2 * 192;
    s.score = 48;
    s.out_dir = dir_.string();
    s.max_model_len = 1024;
    s.batch_tokens = 1024;
    return s;
  }
  // A file of short items that the model does well.
  std::string items() const {
    const std::string path = (dir_ / "items.jsonl").string();
    std::ifstream all(source_dir() / "models/snapmla-20m/eval/items.jsonl");
    std::ofstream out(path);
    int ledgers = 0, recalls = 0;
    for (std::string line; std::getline(all, line);) {
      const bool ledger = line.find("\"ledger/8/") != std::string::npos && ledgers++ < 2;
      const bool recall = line.find("\"recall/512/") != std::string::npos && recalls++ < 2;
      if (ledger || recall) out << line << "\n";
    }
    return path;
  }
  std::filesystem::path dir_;
};

const Json& row_of(const Json& rows, const std::string& arm, const std::string& kind = "") {
  for (const Json& row : rows) {
    if (row["arm"] == arm && (kind.empty() || row["kind"] == kind)) return row;
  }
  throw std::runtime_error("no row of " + arm);
}

// Everything but the times.
Json without_times(Json report) {
  report.erase("throughput");
  return report;
}

TEST_F(Quality, TheSchemeIsFineAndPlantedFaultsAreCaught) {
  Evaluation e(settings({"a2", "sim", "faults", "noise:0.3", "noise:0.001"}));
  ASSERT_TRUE(e.run({}));
  const Json report = e.report();
  const auto kl = [&](const std::string& arm) {
    return row_of(report["text"], arm)["kl"]["value"].get<double>();
  };
  EXPECT_GT(kl("a2"), 1e-6) << "FP8 must cost something";
  EXPECT_LT(kl("a2"), 1e-3);
  // Nothing but the top token, where 1 of 48 tokens in both windows is beyond 99.5%.
  for (const Json& what : row_of(report["verdicts"], "a2")["beyond"])
    EXPECT_THAT(what.get<std::string>(), testing::StartsWith("top1"));
  EXPECT_GE(row_of(report["text"], "a2")["top1"]["value"].get<double>(), 0.95);
  // The simulation is the scheme.
  EXPECT_NEAR(kl("sim"), kl("a2"), 0.2 * kl("a2"));
  EXPECT_NEAR(kl("noise:0.001"), kl("a2"), 0.5 * kl("a2"));
  for (const char* arm : {"f-neighbour", "f-binade", "f-rope", "noise:0.3"}) {
    EXPECT_GT(kl(arm), 5 * kl("a2")) << arm;
    EXPECT_TRUE(row_of(report["verdicts"], arm)["caught"].get<bool>()) << arm;
  }
  EXPECT_GT(kl("f-neighbour"), kl("f-neighbour-rare"));
  // Layer by layer: every layer of a2 is off by something, and less than with a fault.
  const Json& mine = row_of(report["layer_errors"], "a2");
  const Json& faulty = row_of(report["layer_errors"], "f-binade");
  ASSERT_EQ(mine["attention"].size(), report["layers"].get<std::size_t>());
  for (std::size_t l = 0; l < mine["attention"].size(); ++l) {
    EXPECT_GT(mine["attention"][l].get<double>(), 1e-5);
    EXPECT_LT(mine["attention"][l].get<double>(), faulty["attention"][l].get<double>());
  }
  const std::string text = markdown(report);
  EXPECT_THAT(text, testing::HasSubstr("| sim (simulated) | a2, simulated |"));
  EXPECT_THAT(text, testing::HasSubstr("| f-binade | scales twice too large |"));
}

// The longer the row and the flatter the softmax, the more one accumulator of 14 bits loses.
TEST_F(Quality, OneAccumulatorIsCaughtOnLongRows) {
  Settings s = settings({"a2-1level", "tc-2level"});
  s.contexts = {};
  s.attention = {512, 32768};
  Evaluation e(s);
  ASSERT_TRUE(e.run({}));
  const Json report = e.report();
  ASSERT_EQ(report["attention"].size(), 6u);
  const auto error = [&](std::size_t row, const char* key) {
    return report["attention"][row][key].get<double>();
  };
  for (std::size_t i = 0; i < 6; ++i) {
    EXPECT_GT(error(i, "f32_two_level"), 1e-5);
    EXPECT_LT(error(i, "14bit_two_level"), 2 * error(i, "f32_two_level")) << i;
  }
  EXPECT_GT(error(3, "14bit_one_level"), 10 * error(3, "f32_two_level"));
  EXPECT_GT(error(3, "14bit_one_level"), 3 * error(0, "14bit_one_level"));
  EXPECT_TRUE(row_of(report["verdicts"], "a2-1level")["caught"].get<bool>());
  EXPECT_FALSE(row_of(report["verdicts"], "tc-2level")["caught"].get<bool>());
}

// Tokens that were not fed through prefill, 1 or 16 at a time: the same figures but for roundings.
TEST_F(Quality, StepsAndPromptsDoNotMatterBeyondRounding) {
  Settings s = settings({"a2"});
  std::vector<double> perplexities;
  for (const int step : {16, 5}) {
    s.text_step = step;
    s.prompts_by_decode = step == 5;
    s.out_dir = (dir_ / std::to_string(step)).string();
    std::filesystem::create_directories(s.out_dir);
    Evaluation e(s);
    ASSERT_TRUE(e.run({}));
    const Json report = e.report();
    perplexities.push_back(row_of(report["text"], "a1")["perplexity"]["value"].get<double>());
    EXPECT_EQ(row_of(report["text"], "a1")["tokens"], 96);
  }
  EXPECT_NEAR(perplexities[0], perplexities[1], 2e-3 * perplexities[0]);
  EXPECT_GT(perplexities[0], 1.5);
  EXPECT_LT(perplexities[0], 30);
}

TEST_F(Quality, TasksAreRightTokenByTokenAndInSteps) {
  Settings s = settings({"a2", "f-binade"});
  s.contexts = {};
  s.item_files = {items()};
  for (const int step : {1, 16}) {
    s.answer_step = step;
    s.prompts_by_decode = step == 16;
    s.out_dir = (dir_ / std::to_string(step)).string();
    std::filesystem::create_directories(s.out_dir);
    Evaluation e(s);
    ASSERT_TRUE(e.run({}));
    const Json report = e.report();
    for (const char* arm : {"a1", "a2"}) {
      const Json& recall = row_of(report["tasks"], arm, "recall");
      EXPECT_EQ(recall["right"], 2);
      EXPECT_EQ(recall["answers"], 32);
      EXPECT_EQ(recall["answers_right"], 32);
      const Json& ledger = row_of(report["tasks"], arm, "ledger");
      EXPECT_EQ(ledger["right"], 2);
      EXPECT_TRUE(ledger["first_divergence"].empty());
    }
    const Json& broken = row_of(report["tasks"], "f-binade", "ledger");
    EXPECT_EQ(broken["right"], 0);
    EXPECT_FALSE(broken["first_divergence"].empty());
  }
}

TEST_F(Quality, AStoppedRunGoesOnToTheSameReport) {
  Settings s = settings({"a2", "a3-cal"});
  s.item_files = {items()};
  s.answer_step = 16;
  s.out_dir = (dir_ / "whole").string();
  std::filesystem::create_directories(s.out_dir);
  Evaluation whole(s);
  ASSERT_TRUE(whole.run({}));
  s.out_dir = (dir_ / "parts").string();
  std::filesystem::create_directories(s.out_dir);
  int runs = 0;
  for (bool finished = false; !finished; ++runs) {
    ASSERT_LT(runs, 20);
    Evaluation part(s);
    double first = -1;
    // Stops in the middle of the second unit that this run begins.
    int begun = 0;
    std::string last;
    finished = part.run([&](double done, double, const std::string& what) {
      if (first < 0) first = done;
      begun += what != last ? 1 : 0;
      last = what;
      return begun < 2 || what.empty();
    });
    EXPECT_EQ(part.finished(), finished);
    if (runs > 0) {
      EXPECT_GT(first, 0) << "what was done counts as done";
    }
  }
  EXPECT_GT(runs, 1);
  EXPECT_EQ(without_times(Evaluation(s).report()).dump(), without_times(whole.report()).dump());
  s.arms = {"a2"};
  EXPECT_THROW(Evaluation{s}, Error);
}

TEST_F(Quality, BadSettingsAreRefused) {
  const auto refuses = [&](const std::function<void(Settings&)>& change, const std::string& says) {
    Settings s = settings({"a2"});
    change(s);
    try {
      Evaluation e(s);
      ADD_FAILURE() << "accepted: " << says;
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr(says));
    }
  };
  refuses([](Settings& s) { s.contexts = {1}; }, "contexts: got 1, accepted are 2 to 1024 tokens");
  refuses([](Settings& s) { s.contexts = {2048}; }, "contexts: got 2048");
  refuses([](Settings& s) { s.contexts = {}; }, "neither text windows nor items");
  refuses([](Settings& s) { s.text_step = 17; }, "text_step: got 17");
  refuses([](Settings& s) { s.answer_step = 0; }, "answer_step: got 0");
  refuses([](Settings& s) { s.text_file = "/none.txt"; }, "/none.txt");
  refuses([](Settings& s) { s.arms = {"a8"}; }, "got 'a8'");
  refuses(
      [](Settings& s) {
        s.text_file.clear();
        s.arms = {"a3-cal"};
      },
      "no text (--text)");
}

}  // namespace
}  // namespace snapmla::quality
