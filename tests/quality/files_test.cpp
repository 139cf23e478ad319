// Items, text and the journal: good input, and one clear error for everything else.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "quality/arms.h"
#include "quality/items.h"
#include "quality/journal.h"
#include "snapmla/error.h"
#include "support/source_dir.h"

namespace snapmla::quality {
namespace {

using Json = Journal::Json;
using testing::HasSubstr;

const Tokenizer& tokenizer() {
  static const Tokenizer t = Tokenizer::load(source_dir() / "models/snapmla-20m");
  return t;
}

const std::vector<std::int32_t>& stream() {
  static const std::vector<std::int32_t> s = [] {
    std::string text;
    for (int i = 0; i < 300; ++i) text += "def f" + std::to_string(i) + "(x):\n    return x\n";
    return tokenizer().encode(text, false);
  }();
  return s;
}

std::vector<Item> parse(const std::string& text, std::int64_t limit = 4096) {
  return parse_items(text, "items.jsonl", tokenizer(), stream(), limit);
}

std::string error_of(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

class Files : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = std::filesystem::temp_directory_path() /
           ("snapmla-files-" + std::to_string(getpid()) + "-" +
            testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  std::string path(const std::string& name) const { return (dir_ / name).string(); }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(path(name), std::ios::binary) << text;
  }
  std::filesystem::path dir_;
};

TEST(Items, SegmentsBecomeTokensAndAnswers) {
  const auto items = parse(
      R"({"id":"a","kind":"recall","size":64,"depth":0.5,"counts":"first","segments":[)"
      R"({"given":"<｜begin▁of▁sentence｜>a1=42\n?a1="},{"answer":"42\n"},{"given":"?b="},{"answer":"7\n"}]})"
      "\n\n");
  ASSERT_EQ(items.size(), 1u);
  const Item& item = items[0];
  EXPECT_TRUE(item.counts_first);
  EXPECT_EQ(item.depth, 0.5);
  EXPECT_EQ(item.tokens.front(), 0) << "added tokens are tokens";
  ASSERT_EQ(item.answers.size(), 2u);
  const auto text = [&](const Answer& a) {
    return tokenizer().decode(
        std::span(item.tokens)
            .subspan(static_cast<std::size_t>(a.begin), static_cast<std::size_t>(a.end - a.begin)));
  };
  EXPECT_EQ(text(item.answers[0]), "42\n");
  EXPECT_EQ(text(item.answers[1]), "7\n");
}

TEST(Items, FillsMakeUpTheLengthAndEndWithLines) {
  const auto items = parse(
      R"({"id":"n","kind":"needle","size":512,"length":512,"start":0.3,"segments":[)"
      R"({"given":"<｜begin▁of▁sentence｜>"},{"fill":0.25},{"given":"# code is 12.\n"},{"fill":0.75},)"
      R"({"given":"# code is "},{"answer":"12.\n"}]})");
  const Item& item = items.at(0);
  EXPECT_LE(item.tokens.size(), 512u);
  EXPECT_GT(item.tokens.size(), 512u - 2 * 40) << "no line of the text is that long";
  EXPECT_EQ(tokenizer().decode(
                std::span(item.tokens)
                    .last(static_cast<std::size_t>(item.answers[0].end - item.answers[0].begin))),
            "12.\n");
  const std::string text = tokenizer().decode(item.tokens);
  const std::size_t at = text.find("# code is 12.\n");
  ASSERT_NE(at, std::string::npos);
  EXPECT_EQ(text[at - 1], '\n');
  EXPECT_NEAR(static_cast<double>(at) / static_cast<double>(text.size()), 0.25, 0.05);
}

TEST(Items, MistakesAreNamedWithTheirLine) {
  const std::string head = R"({"id":"a","kind":"k","size":1,"segments":)";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"{", "items.jsonl:1: accepted is one JSON object per line"},
      {R"({"kind":"k"})", "items.jsonl:1: 'id' is missing"},
      {R"({"id":3,"kind":"k"})", "'id': got 3, accepted is a string"},
      {head + "[]}", "accepted is at least one answer, after something that is given"},
      {head + R"([{"answer":"x"}]})", "after something that is given"},
      {head + R"([{"given":"x"},{"answer":""}]})", "at least one answer"},
      {head + R"([{"text":"x"}]})", "'segments': got"},
      {head + R"([{"given":"x"},{"fill":0.5},{"answer":"x"}]})", "'start' is missing"},
      {R"({"id":"a","kind":"k","size":1,"start":0,"length":99999,"segments":[{"given":"x"},{"fill":1},{"answer":"y"}]})",
       "tokens of text (--text), accepted are at least"},
      {R"({"id":"a","kind":"k","size":1,"start":0,"length":64,"segments":[{"fill":0.9},{"fill":0.9},{"answer":"y"}]})",
       "accepted are shares of at most 1"},
      {R"({"id":"a","kind":"k","size":1,"counts":"some","segments":[]})",
       "accepted are first, whole"},
      {R"({"id":"a","kind":"k","size":1,"depth":2,"segments":[]})", "'depth': got 2"},
  };
  for (const auto& [text, says] : cases) {
    EXPECT_THAT(error_of([&] { parse(text); }), HasSubstr(says)) << text;
  }
  const std::string good = head + R"([{"given":"x"},{"answer":"y"}]})" + "\n";
  EXPECT_THAT(error_of([&] { parse(good + good); }),
              HasSubstr("items.jsonl:2: 'id': got 'a' again"));
  EXPECT_THAT(error_of([&] { parse(good, 1); }),
              HasSubstr("an item of 2 tokens, accepted are at most 1"));
}

TEST(Items, FirstOfEachSize) {
  std::string text;
  for (int i = 0; i < 6; ++i) {
    text += R"({"id":")" + std::to_string(i) + R"(","kind":"k","size":)" + std::to_string(i % 2) +
            R"(,"segments":[{"given":"x"},{"answer":"y"}]})" + "\n";
  }
  std::vector<std::string> ids;
  for (const Item& item : first_of_each(parse(text), 2)) ids.push_back(item.id);
  EXPECT_EQ(ids, (std::vector<std::string>{"0", "1", "2", "3"}));
  EXPECT_EQ(first_of_each(parse(text), 0).size(), 6u);
}

TEST_F(Files, DocumentsEndWithTheEndToken) {
  write("t.jsonl", "{\"text\":\"a b\"}\n{\"text\":\"c\",\"licence\":\"MIT\"}\n");
  write("t.txt", "{\"text\":\"a b\"}\n");
  const auto two = read_text(path("t.jsonl"), tokenizer(), 1);
  EXPECT_EQ(std::count(two.begin(), two.end(), 1), 2);
  EXPECT_EQ(std::count(two.begin(), two.end(), 0), 2) << "the tokenizer's BOS before each";
  const auto plain = read_text(path("t.txt"), tokenizer(), 1);
  EXPECT_EQ(tokenizer().decode(plain), "{\"text\":\"a b\"}\n");
  EXPECT_THAT(error_of([&] { read_text(path("none"), tokenizer(), 1); }), HasSubstr("/none"));
}

TEST_F(Files, JournalGoesOnWhereItStopped) {
  const Json settings = {{"arms", {"a1"}}, {"score", 3}};
  {
    Journal j(path("s"), settings);
    j.add("text/1/0", {{"x", 1}});
    j.add("text/1/1", {{"x", 2}});
  }
  // A kill in the middle of a line.
  std::string bytes = read_bytes(path("s"));
  write("s", bytes + "{\"unit\":\"text/1/2\",\"resu");
  {
    Journal j(path("s"), settings);
    EXPECT_EQ(j.units().size(), 2u);
    EXPECT_TRUE(j.has("text/1/1"));
    EXPECT_FALSE(j.has("text/1/2"));
    j.add("text/1/2", {{"x", 3}});
  }
  Journal j(path("s"), settings);
  EXPECT_EQ(j.units().size(), 3u);
  EXPECT_EQ(j.units().at("text/1/2")["x"], 3);
}

TEST_F(Files, JournalOfOtherSettingsIsRefused) {
  { Journal j(path("s"), {{"arms", {"a1"}}, {"score", 3}}); }
  EXPECT_THAT(
      error_of([&] {
        Journal(path("s"), {{"arms", {"a1"}}, {"score", 4}});
      }),
      HasSubstr("other settings: score 3, now 4; accepted are the same settings, or another"));
  EXPECT_THAT(error_of([&] {
                Journal(path("s"), {{"arms", {"a1"}}});
              }),
              HasSubstr("score 3, now nothing"));
  // Cut off inside the very first line: nothing was done yet.
  write("cut", "{\"settings\":{\"ar");
  Journal begun(path("cut"), {{"score", 1}});
  begun.add("u", {});
  EXPECT_EQ(Journal(path("cut"), {{"score", 1}}).units().size(), 1u);
}

TEST_F(Files, ForeignFilesAreNotTouched) {
  for (const std::string text :
       {"hello\n", "hello", "{\"unit\":\"x\"}\n", "{\"settings\":{}}\nrubbish\n"}) {
    write("s", text);
    EXPECT_THAT(error_of([&] { Journal(path("s"), Json::object()); }),
                HasSubstr("not the state of an evaluation"))
        << text;
    EXPECT_EQ(read_bytes(path("s")), text);
  }
}

TEST(Arms, ChosenByNameGroupAndNoise) {
  const auto names = [](const std::vector<std::string>& words) {
    std::vector<std::string> list;
    for (const Arm& arm : select_arms(words)) list.push_back(arm.name);
    return list;
  };
  EXPECT_EQ(names({"a2"}), (std::vector<std::string>{"a1", "a2"}));
  EXPECT_EQ(names({"a4", "a1", "a4"}), (std::vector<std::string>{"a1", "a4"}));
  EXPECT_EQ(names({"noise:0.002"}).back(), "noise:0.002");
  EXPECT_EQ(names({"main"}).size(), 10u);
  EXPECT_EQ(names({"all"}).size(), all_arms().size());
  for (const char* bad : {"a9", "noise:", "noise:0", "noise:2", "noise:x", "noise:0.1x", ""}) {
    EXPECT_THAT(error_of([&] { select_arms({bad}); }),
                HasSubstr("got '" + std::string(bad) + "', accepted are main"));
  }
}

// A real page can hold what a real kernel is to read.
TEST(Arms, OnlySimulatedArmsNeedMoreThanAnFp8Page) {
  for (const Arm& arm : all_arms()) {
    EXPECT_EQ(arm.simulated, arm.format == KvCacheFormat::kF32) << arm.name;
    const bool fp8_page = arm.rule && !arm.simulated;
    EXPECT_TRUE(!fp8_page || numeric::stores_in_fp8(*arm.rule)) << arm.name;
  }
}

}  // namespace
}  // namespace snapmla::quality
