// snapmla run --chat: one answer from a pipe, a conversation on a terminal.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "e2e/process.h"
#include "model/chat.h"
#include "snapmla/snapmla.h"

namespace snapmla::e2e {
namespace {

using testing::ContainsRegex;
using testing::HasSubstr;
using testing::Not;

// What the library answers to a conversation, greedily.
std::string answer(Engine& engine, const std::vector<model::ChatMessage>& messages,
                   std::int64_t max_tokens) {
  const Tokenizer& tokenizer = engine.tokenizer();
  SamplingParams params;
  params.max_tokens = max_tokens;
  return engine
      .generate(model::apply_chat_template(tokenizer, model::load_chat_format(shipped_model()),
                                           messages, true),
                params)
      .text;
}

Engine library() {
  EngineOptions options;
  options.model_dir = shipped_model();
  options.max_model_len = 2048;
  return Engine(options);
}

TEST(Chat, AMessageFromAPipeGetsOneAnswer) {
  Engine engine = library();
  const std::string want = answer(engine, {{"system", "Sort the list."}, {"user", "7 3 9 1"}}, 24);
  const Result r =
      snapmla({"run", "--chat", "--system", "Sort the list.", "-n", "24"}, {.input = "7 3 9 1"});
  EXPECT_EQ(r.status, 0);
  EXPECT_EQ(r.out, want + "\n");
  EXPECT_NE(want, answer(engine, {{"user", "7 3 9 1"}}, 24)) << "the system message has no effect";
}

class ChatOnATerminal : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_terminals()) GTEST_SKIP() << "no pseudo-terminals here (is /dev/pts mounted?)";
  }
};

// Text with the terminal's line ends.
std::string on_terminal(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '\n') out += '\r';
    out += c;
  }
  return out;
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++n;
  return n;
}

// Types the n-th entry of `script` when the n-th prompt ("> ") appears.
Launch typed(const std::vector<std::string>& script) {
  Launch launch;
  launch.terminal = true;
  launch.extra_env = {"TERM=dumb"};
  launch.on_output = [script, next = std::size_t{0}](int, const std::string& seen) mutable {
    if (next >= script.size() || count("\n" + seen, "\n> ") <= next) return std::string();
    return script[next++];
  };
  return launch;
}

TEST_F(ChatOnATerminal, AConversationKeepsItsHistoryAndReusesItsPages) {
  const std::string first =
      "Here is a longer question, so that the prompt fills more than one page of the cache: "
      "what does the function add(a, b) return when a is 12 and b is 30, and why is that so? "
      "Please count the words of this sentence too, one by one, and then add them up.";
  const std::string second = "And then?";
  Engine engine = library();
  const std::string a = answer(engine, {{"user", first}}, 16);
  const std::string b = answer(engine, {{"user", first}, {"assistant", a}, {"user", second}}, 16);
  const std::string alone = answer(engine, {{"user", second}}, 16);
  ASSERT_NE(alone, b);
  const Result r =
      snapmla({"run", "--chat", "-n", "16", "-m", shipped_model()},
              typed({first + "\n", second + "\n", "/clear\n", second + "\n", "/exit\n"}));
  EXPECT_EQ(r.status, 0);
  const std::size_t at_a = r.out.find(on_terminal(a + "\n"));
  ASSERT_NE(at_a, std::string::npos) << r.out;
  const std::size_t at_b = r.out.find(on_terminal(b + "\n"), at_a + a.size());
  ASSERT_NE(at_b, std::string::npos) << r.out;
  EXPECT_NE(r.out.find(on_terminal(alone + "\n"), at_b + b.size()), std::string::npos) << r.out;
  EXPECT_THAT(r.out, ContainsRegex("prompt [0-9]+ tokens \\((64|128) reused\\)"));
}

TEST_F(ChatOnATerminal, CtrlCStopsAnAnswerButNotTheConversation) {
  int step = 0;
  Launch launch;
  launch.terminal = true;
  launch.on_output = [&](int pid, const std::string& seen) -> std::string {
    if (step == 0 && seen.find("> ") != std::string::npos) {
      ++step;
      return "Write something long.\n";
    }
    if (step == 1 && seen.size() > seen.find("long.") + 60) {
      ++step;
      kill(pid, SIGINT);
    }
    if (step == 2 && count(seen, "\n> ") == 2) {
      ++step;
      return "3 + 4\n";
    }
    if (step == 3 && count(seen, "\n> ") == 3) {
      ++step;
      return "/exit\n";
    }
    return "";
  };
  const Result r = snapmla({"run", "--chat", "--ignore-eos", "-n", "600"}, launch);
  EXPECT_EQ(step, 4);
  EXPECT_EQ(r.status, 0) << r.out;
  EXPECT_EQ(count(r.out, "generated 600 tokens"), 1u) << r.out;  // the second answer is whole
}

TEST_F(ChatOnATerminal, CtrlCWhileWaitingEndsIt) {
  Launch launch;
  launch.terminal = true;
  launch.on_output = [](int pid, const std::string& seen) {
    if (seen.ends_with("> ")) kill(pid, SIGINT);
    return std::string();
  };
  EXPECT_EQ(snapmla({"run", "--chat"}, launch).status, 130);
}

TEST_F(ChatOnATerminal, AConversationThatNoLongerFitsSaysSoAndGoesOn) {
  const std::string words(600, 'z');
  const Result r = snapmla({"run", "--chat", "-n", "4", "-c", "128"},
                           typed({words + "\n", "hello\n", "/exit\n"}));
  EXPECT_EQ(r.status, 0) << r.out;
  EXPECT_THAT(r.out, ContainsRegex("snapmla: error: prompt: got [0-9]+ tokens, accepted are at "
                                   "most 128 \\(/clear starts anew\\)"));
  EXPECT_THAT(r.out, ContainsRegex("generated [0-9] tokens"));
}

TEST(Chat, ACheckpointWithoutAKnownTemplateIsRefusedBeforeItIsLoaded) {
  namespace fs = std::filesystem;
  const fs::path dir = fresh_directory();
  for (const auto& entry : fs::directory_iterator(shipped_model())) {
    fs::create_symlink(entry.path(), dir / entry.path().filename());
  }
  fs::remove(dir / "tokenizer_config.json");
  fs::remove(dir / "model-00001-of-00002.safetensors");  // would be the error if loading came first
  const Result r = snapmla({"run", "--chat", "-p", "x", "-m", dir.string()});
  EXPECT_EQ(r.status, 1);
  EXPECT_THAT(r.err, HasSubstr("chat template is absent or unknown"));
  EXPECT_EQ(lines(r.err).size(), 1u);
}

}  // namespace
}  // namespace snapmla::e2e
