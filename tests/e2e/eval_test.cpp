// snapmla eval as a user runs it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "e2e/process.h"

namespace snapmla {
namespace {

using Json = nlohmann::json;
using testing::HasSubstr;
using Words = std::vector<std::string>;

Words eval(const std::string& out, const Words& more) {
  Words words = {"eval", "-t",         "2",   "--device",      "cpu", "-c",      "512", "-o",
                 out,    "--contexts", "128", "--text-tokens", "256", "--score", "32"};
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

// One item, so that no default set is taken.
std::string one_item(const std::string& dir) {
  std::filesystem::create_directories(dir);
  const std::string path = dir + "/one.jsonl";
  std::ofstream(path)
      << R"({"id":"x","kind":"sum","size":1,"segments":[{"given":"1+1="},{"answer":"2"}]})"
      << "\n";
  return path;
}

TEST(Eval, WritesAReportAndGoesOnWhereItStopped) {
  const std::string dir = e2e::fresh_directory(), out = dir + "/out";
  const Words words = eval(out, {"--arms", "a2,f-binade", "--items", one_item(dir)});
  Words hurried = words;
  hurried.insert(hurried.end(), {"--time-limit", "0.000001"});
  const e2e::Result stopped = e2e::snapmla(hurried);
  EXPECT_EQ(stopped.status, 3) << stopped.err;
  EXPECT_THAT(stopped.err, HasSubstr("not finished, the same command goes on"));
  const e2e::Result r = e2e::snapmla(words);
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("| f-binade | scales twice too large |"));
  EXPECT_THAT(r.err, HasSubstr("complete"));
  const Json report = Json::parse(std::ifstream(out + "/report.json"));
  EXPECT_TRUE(report["finished"].get<bool>());
  EXPECT_THAT(report["command"].get<std::string>(), HasSubstr("snapmla eval -t 2"));
  EXPECT_EQ(report["settings"]["arms"], (Json{"a1", "a2", "f-binade"}));
  EXPECT_EQ(report["text"].size(), 3u);
  EXPECT_EQ(report["tasks"].size(), 3u);
  std::string markdown;
  std::getline(std::ifstream(out + "/report.md"), markdown, '\0');
  EXPECT_EQ(markdown, r.out);
  // Nothing is left to do; and other settings are another evaluation.
  EXPECT_EQ(e2e::snapmla(words).status, 0);
  Words other = words;
  other.insert(other.end(), {"--answer-step", "2"});
  const e2e::Result refused = e2e::snapmla(other);
  EXPECT_EQ(refused.status, 1);
  EXPECT_THAT(refused.err, HasSubstr("other settings: answer_step 1, now 2"));
  EXPECT_EQ(refused.out, "");
}

TEST(Eval, CtrlCLeavesAStateToGoOnFrom) {
  const std::string dir = e2e::fresh_directory(), out = dir + "/out";
  const Words words = {
      "eval", "-t",      "1",          "--device", "cpu", "--arms", "a2",
      "-o",   out,       "--contexts", "512",      "-c",  "512",    "--batch-tokens",
      "512",  "--items", one_item(dir)};
  bool sent = false;
  e2e::Launch launch;
  launch.on_output = [&](int pid, const std::string& seen) {
    if (!sent && seen.find('%') != std::string::npos) {
      sent = true;
      kill(pid, SIGINT);
    }
    return std::string();
  };
  const e2e::Result r = e2e::snapmla(words, launch);
  ASSERT_TRUE(sent);
  EXPECT_EQ(r.status, 130) << r.err;
  EXPECT_THAT(r.err, HasSubstr("not finished"));
  EXPECT_TRUE(std::filesystem::exists(out + "/state.jsonl"));
}

TEST(Eval, WrongArgumentsGiveOneError) {
  const std::string dir = e2e::fresh_directory();
  struct Mistake {
    Words words;
    int status;
    std::string says;
  };
  std::ofstream(dir + "/bad.jsonl") << "{\n";
  std::ofstream(dir + "/occupied") << "x";
  const std::vector<Mistake> mistakes = {
      {{"--arms", "a7"}, 1, "arms: got 'a7', accepted are main, ablations"},
      {{"--contexts", "1"}, 1, "contexts: got 1, accepted are 2 to 512"},
      {{"--contexts", "-1"}, 2, "an integer from 0"},
      {{"--quick", "--full"}, 2, "excludes"},
      {{"--prompts", "fast"}, 2, "got 'fast', accepted are prefill, decode"},
      {{"--text-step", "17"}, 2, "1 to 16"},
      {{"--time-limit", "-1"}, 2, "accepted is a number >= 0"},
      {{"--text", "/nonexistent.txt"}, 1, "/nonexistent.txt"},
      {{"--items", dir + "/bad.jsonl"}, 1, "bad.jsonl:1: accepted is one JSON object per line"},
      {{"--contexts", "600"}, 1, "contexts: got 600, accepted are 2 to 512"},
      {{"--model", "/nonexistent"}, 1, "/nonexistent"},
      {{"-o", dir + "/occupied"}, 1, "occupied"},
  };
  for (const Mistake& m : mistakes) {
    Words words = {"eval", "-t", "1", "--device", "cpu", "-c", "512", "--contexts", "128"};
    const bool has_output = m.words[0] == "-o";
    if (!has_output) words.insert(words.end(), {"-o", dir + "/out"});
    if (m.words[0] == "--contexts")
      words.resize(words.size() - 4), words.insert(words.end(), {"-o", dir + "/out"});
    if (m.words[0] != "--items") words.insert(words.end(), {"--items", one_item(dir)});
    words.insert(words.end(), m.words.begin(), m.words.end());
    const e2e::Result r = e2e::snapmla(words);
    EXPECT_EQ(r.status, m.status) << m.words[0] << " " << m.words.back() << ": " << r.err;
    EXPECT_THAT(r.err, HasSubstr(m.says)) << m.words[0];
    EXPECT_EQ(r.out, "");
  }
}

TEST(Eval, HelpListsEveryArm) {
  const e2e::Result r = e2e::snapmla({"eval", "--help"});
  EXPECT_EQ(r.status, 0);
  for (const char* word : {"a1-split", "a2-1level", "a3-cal", "a5", "no-p", "f-neighbour-rare",
                           "noise:X", "(simulated)", "snapmla eval --quick", "Exit status 3"}) {
    EXPECT_THAT(r.out, HasSubstr(word));
  }
  for (const char* word : {" INT", " TEXT ", " FLOAT", ":{", " in ["}) {
    EXPECT_THAT(r.out, testing::Not(HasSubstr(word)));
  }
  for (const std::string& line : e2e::lines(r.out)) EXPECT_LE(line.size(), 96u) << line;
}

}  // namespace
}  // namespace snapmla
