// Stop strings: the text ends before the first of them, wherever tokens and characters are cut.
#include "engine/stop_text.h"

#include <gtest/gtest.h>

#include <random>

namespace snapmla::engine {
namespace {

// A tokenizer of single bytes: ids are bytes, 256 is special.
const Tokenizer& bytes_tokenizer() {
  static const Tokenizer tokenizer = [] {
    std::string vocab;
    std::uint32_t next = 256;
    for (std::uint32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
      char escaped[16];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", printable ? b : next++);
      vocab += (b ? ",\"" : "\"") + std::string(escaped) + "\":" + std::to_string(b);
    }
    return Tokenizer::parse(
        R"({"model":{"type":"BPE","vocab":{)" + vocab +
            R"(},"merges":[]},"added_tokens":[{"id":256,"content":"<end>","special":true}]})",
        "tokenizer.json");
  }();
  return tokenizer;
}

// What the text is, fed byte by byte; every piece shown must be a prefix of the result.
std::string run(const std::string& text, std::vector<std::string> stop, bool* stopped = nullptr) {
  StopText out(&bytes_tokenizer(), std::move(stop));
  std::string shown;
  for (char c : text) {
    shown += out.push(static_cast<unsigned char>(c));
    EXPECT_EQ(shown, out.text());
    if (out.stopped()) break;
  }
  if (!out.stopped()) shown += out.finish();
  EXPECT_EQ(shown, out.text());
  if (stopped) *stopped = out.stopped();
  return shown;
}

TEST(StopText, CutsBeforeTheFirstStop) {
  bool stopped = false;
  EXPECT_EQ(run("hello world", {"wor"}, &stopped), "hello ");
  EXPECT_TRUE(stopped);
  EXPECT_EQ(run("hello world", {"xyz"}, &stopped), "hello world");
  EXPECT_FALSE(stopped);
  EXPECT_EQ(run("hello", {"hello"}), "");
  EXPECT_EQ(run("abcabd", {"abd", "cab"}), "ab");
  EXPECT_EQ(run("aaab", {"aab"}), "a");  // the held tail overlaps itself
  EXPECT_EQ(run("abababc", {"ababc"}), "ab");
  EXPECT_EQ(run("no stops", {}), "no stops");
  EXPECT_EQ(run("empty is no stop", {""}), "empty is no stop");
  EXPECT_EQ(run("half a stop", {"stopped"}), "half a stop");  // shown at the end after all
}

TEST(StopText, CharactersStayWhole) {
  EXPECT_EQ(run("x\xe2\x82\xac\xe2\x82\xacy", {"\xe2\x82\xac"}), "x");
  EXPECT_EQ(run("\xf0\x9f\x98\x80!", {"!"}), "\xf0\x9f\x98\x80");
  EXPECT_EQ(run("cut\xe2\x82", {"zz"}), "cut\xef\xbf\xbd");
  StopText out(&bytes_tokenizer(), {});
  EXPECT_EQ(out.push(0xe2), "");
  EXPECT_EQ(out.push(0x82), "");
  EXPECT_EQ(out.push(0xac), "\xe2\x82\xac");
  EXPECT_EQ(out.push(256), "");  // special tokens have no text
}

TEST(StopText, NothingIsShownThatCouldBeginAStop) {
  StopText out(&bytes_tokenizer(), {"END"});
  EXPECT_EQ(out.push('x'), "x");
  EXPECT_EQ(out.push('E'), "");
  EXPECT_EQ(out.push('N'), "");
  EXPECT_EQ(out.push('N'), "ENN");
  EXPECT_EQ(out.push('E'), "");
  EXPECT_EQ(out.push('N'), "");
  EXPECT_EQ(out.push('D'), "");
  EXPECT_TRUE(out.stopped());
  EXPECT_EQ(out.push('y'), "");
}

TEST(StopText, WithoutATokenizerThereIsNoText) {
  StopText out(nullptr, {"a"});
  EXPECT_EQ(out.push('a') + out.finish(), "");
  EXPECT_FALSE(out.stopped());
}

class StopTextRandom : public testing::TestWithParam<unsigned> {};

// The plain rule: everything before the first occurrence of any stop string, when reading on.
TEST_P(StopTextRandom, EqualsSearchingTheWholeText) {
  std::mt19937 rng(GetParam());
  const auto word = [&rng](std::size_t n) {
    std::string s;
    for (std::size_t i = 0; i < n; ++i) s += static_cast<char>('a' + rng() % 3);
    return s;
  };
  const std::string text = word(30);
  const std::vector<std::string> stop = {word(2 + rng() % 4), word(3 + rng() % 3)};
  // Reading on, the stop that ENDS first stops; of those, the text before it is kept.
  std::string want = text;
  for (std::size_t end = 1; end <= text.size() && want == text; ++end) {
    std::size_t first = std::string::npos;
    for (const std::string& s : stop) first = std::min(first, text.substr(0, end).find(s));
    if (first != std::string::npos) want = text.substr(0, first);
  }
  EXPECT_EQ(run(text, stop), want) << text << " " << stop[0] << " " << stop[1];
}

INSTANTIATE_TEST_SUITE_P(Seeds, StopTextRandom, testing::Range(0u, 200u));

}  // namespace
}  // namespace snapmla::engine
