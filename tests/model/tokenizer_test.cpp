// The tokenizer against Hugging Face's, on every golden string; round trips; refused files.
#include "model/tokenizer.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "model/utf8.h"
#include "snapmla/error.h"

namespace snapmla {
namespace {

const std::string kOracles = std::string(SNAPMLA_SOURCE_DIR) + "/tests/oracles/tokenizer/";
const std::string kEmbedded = std::string(SNAPMLA_SOURCE_DIR) + "/models/snapmla-20m";

void expect_goldens(const Tokenizer& tokenizer, const std::string& file) {
  std::ifstream stream(file);
  const nlohmann::json rows = nlohmann::json::parse(stream);
  ASSERT_EQ(rows.size(), 250u);
  for (const auto& row : rows) {
    const auto text = row["text"].get<std::string>();
    const auto ids = row["ids"].get<std::vector<std::int32_t>>();
    EXPECT_EQ(tokenizer.encode(text, true, false), ids) << row["text"];
    EXPECT_EQ(tokenizer.decode(ids), row["decoded"].get<std::string>()) << row["text"];
    StreamDecoder stream_decoder(tokenizer);
    std::string streamed;
    for (std::int32_t id : ids) streamed += stream_decoder.push(id);
    EXPECT_EQ(streamed + stream_decoder.finish(), tokenizer.decode(ids)) << row["text"];
  }
}

TEST(Tokenizer, EqualsHuggingFaceOnV3Style) {
  expect_goldens(Tokenizer::load(kOracles + "v3"), kOracles + "v3.json");
}

TEST(Tokenizer, EqualsHuggingFaceOnTheShippedModel) {
  expect_goldens(Tokenizer::load(kEmbedded), kOracles + "embedded.json");
}

// tests/oracles/tokenizer/variants.json: a base file, and what each variant replaces in it.
const nlohmann::json& variants() {
  static const nlohmann::json file = [] {
    std::ifstream stream(kOracles + "variants.json");
    return nlohmann::json::parse(stream);
  }();
  return file;
}

class Variants : public testing::TestWithParam<std::size_t> {};

TEST_P(Variants, EqualHuggingFace) {
  const nlohmann::json& variant = variants()["variants"][GetParam()];
  nlohmann::json file = variants()["base"];
  for (const auto& [key, value] : variant["change"].items()) {
    if (key == "model") {
      file[key].update(value);
    } else {
      file[key] = value;
    }
  }
  const Tokenizer tokenizer = Tokenizer::parse(file.dump(), "tokenizer.json");
  ASSERT_GE(variant["goldens"].size(), 20u);
  for (const auto& row : variant["goldens"]) {
    const auto ids = row["ids"].get<std::vector<std::int32_t>>();
    EXPECT_EQ(tokenizer.encode(row["text"].get<std::string>(), true, false), ids) << row["text"];
    EXPECT_EQ(tokenizer.decode(ids), row["decoded"].get<std::string>()) << row["text"];
  }
}

INSTANTIATE_TEST_SUITE_P(Files, Variants,
                         testing::Range(std::size_t{0}, variants()["variants"].size()),
                         [](const testing::TestParamInfo<std::size_t>& info) {
                           return variants()["variants"][info.param]["name"].get<std::string>();
                         });

// Hugging Face drops such bytes without a word; here that is an error.
TEST(Tokenizer, BytesOutsideTheVocabularyAreRefused) {
  const Tokenizer tokenizer =
      Tokenizer::parse(R"({"model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":[]}})", "t.json");
  EXPECT_EQ(tokenizer.encode("abba"), (std::vector<std::int32_t>{0, 1, 1, 0}));
  try {
    tokenizer.encode("abc");
    ADD_FAILURE() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(std::string(e.what()).find("byte 99"), std::string::npos) << e.what();
  }
}

TEST(Tokenizer, RandomTextSurvivesTheRoundTrip) {
  const Tokenizer tokenizer = Tokenizer::load(kOracles + "v3");
  for (unsigned seed = 0; seed < 500; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 rng(seed);
    std::string text;
    for (int i = 0; i < 60; ++i) {
      const std::uint32_t range = rng() % 3 == 0 ? 0x10ffff : rng() % 2 ? 0x80 : 0x3000;
      const auto code = static_cast<std::uint32_t>(rng() % range);
      if (code < 0xd800 || code > 0xdfff) model::append_utf8(code, text);
    }
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, false, false), false), text);
  }
}

TEST(Tokenizer, PlainTextNeverBecomesAnAddedToken) {
  const Tokenizer tokenizer = Tokenizer::load(kOracles + "v3");
  const auto user = tokenizer.id_of("<｜User｜>");
  ASSERT_TRUE(user);
  EXPECT_EQ(tokenizer.encode("<｜User｜>", true, false), std::vector<std::int32_t>{*user});
  for (std::int32_t id : tokenizer.encode("<｜User｜>", false, false)) EXPECT_NE(id, *user);
}

TEST(Tokenizer, LongPieceEndsQuickly) {
  const Tokenizer tokenizer = Tokenizer::load(kOracles + "v3");
  const std::string text(200'000, 'e');
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
}

void expect_refused(const std::string& json, const std::string& word) {
  try {
    Tokenizer::parse(json, "tokenizer.json");
    ADD_FAILURE() << "accepted: " << json;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("tokenizer.json"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
  }
}

TEST(Tokenizer, RefusesHostileFiles) {
  const auto bpe = [](const std::string& vocab, const std::string& merges,
                      const std::string& rest = "") {
    return R"({"model":{"type":"BPE","vocab":)" + vocab + R"(,"merges":)" + merges + "}" + rest +
           "}";
  };
  expect_refused("{", "tokenizer.json");
  expect_refused(bpe(R"({"a":0,"b":0})", "[]"), "id 0");
  expect_refused(bpe(R"({"a":-1})", "[]"), "vocab");
  expect_refused(bpe(R"({"a":99999999999})", "[]"), "vocab");
  expect_refused(bpe(R"({"":0})", "[]"), "vocab");
  expect_refused(bpe(R"({"a":0})", R"(["a b"])"), "merges[0]");
  expect_refused(bpe(R"({"a":0})", R"([3])"), "merges[0]");
  expect_refused(bpe(R"({"a":0})", R"({})"), "merges");
  expect_refused(bpe(R"({"a":0})", "[]",
                     R"(,"pre_tokenizer":{"type":"Split","pattern":{"Regex":"("},)"
                     R"("behavior":"Isolated","invert":false})"),
                 "pattern");
  expect_refused(bpe(R"({"a":0})", "[]", R"(,"pre_tokenizer":{"type":"Metaspace"})"), "Metaspace");
  expect_refused(bpe(R"({"a":0})", "[]", R"(,"added_tokens":[{"id":1,"content":""}])"), "content");
  const auto added = [&](const std::string& list) {
    return bpe(R"({"a":0,"X":1})", "[]", R"(,"added_tokens":[)" + list + "]");
  };
  EXPECT_NO_THROW(Tokenizer::parse(added(R"({"id":1,"content":"X"})"), "tokenizer.json"));
  expect_refused(added(R"({"id":0,"content":"Y"})"), "id 0 of 'Y'");
  expect_refused(added(R"({"id":2,"content":"X"})"), "'X' has the ids 1 and 2");
  expect_refused(added(R"({"id":2,"content":"Y"},{"id":2,"content":"Z"})"), "id 2 of 'Z'");
  expect_refused(added(R"({"id":2,"content":"Y"},{"id":3,"content":"Y"})"), "ids 2 and 3");
  expect_refused(R"({"model":{"type":"BPE","vocab":{"a":0},"merges":[],"unk_token":"u"}})",
                 "unk_token");
  expect_refused(bpe(R"({"a":0})", "[]",
                     R"(,"pre_tokenizer":{"type":"Split","pattern":{"String":" "},)"
                     R"("behavior":"Glued"})"),
                 "behavior");
}

}  // namespace
}  // namespace snapmla
