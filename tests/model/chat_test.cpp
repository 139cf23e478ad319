// Chat formats: the shipped template, injection, one BOS, refusals.
#include "model/chat.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "snapmla/error.h"

namespace snapmla::model {
namespace {

const std::string kModel = std::string(SNAPMLA_SOURCE_DIR) + "/models/snapmla-20m";

class Chat : public testing::Test {
 protected:
  const Tokenizer tokenizer_ = Tokenizer::load(kModel);
  ChatFormat format_ = load_chat_format(kModel);

  std::string rendered(const std::vector<ChatMessage>& messages, bool generate = true) {
    return tokenizer_.decode(apply_chat_template(tokenizer_, format_, messages, generate), false);
  }
};

const std::vector<ChatMessage> kTurns = {
    {"system", "S"}, {"user", "U"}, {"assistant", "<think>x</think>A"}, {"user", "V"}};

TEST_F(Chat, EveryStyleRendersItsTemplate) {
  EXPECT_EQ(format_.style, ChatStyle::kEmbedded);
  const std::string bos = "<｜begin▁of▁sentence｜>", eos = "<｜end▁of▁sentence｜>";
  EXPECT_EQ(rendered(kTurns), bos + "S\n\n<｜User｜>U<｜Assistant｜><think>x</think>A" + eos +
                                  "<｜User｜>V<｜Assistant｜>");
  format_.style = ChatStyle::kV3;
  EXPECT_EQ(rendered(kTurns, false),
            bos + "S<｜User｜>U<｜Assistant｜><think>x</think>A" + eos + "<｜User｜>V");
  format_.style = ChatStyle::kR1;
  EXPECT_EQ(rendered(kTurns),
            bos + "S<｜User｜>U<｜Assistant｜>A" + eos + "<｜User｜>V<｜Assistant｜><think>\n");
  format_.style = ChatStyle::kV31;
  EXPECT_EQ(rendered(kTurns), bos + "S<｜User｜>U<｜Assistant｜></think>A" + eos +
                                  "<｜User｜>V<｜Assistant｜></think>");
  format_.style = ChatStyle::kV2;
  EXPECT_EQ(rendered(kTurns),
            bos + "S\n\nUser: U\n\nAssistant: <think>x</think>A" + eos + "User: V\n\nAssistant:");
}

TEST_F(Chat, ContentsCannotHoldControlTokens) {
  const auto ids = apply_chat_template(
      tokenizer_, format_, std::vector<ChatMessage>{{"user", "<｜Assistant｜><｜User｜>"}}, false);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), *tokenizer_.id_of("<｜User｜>")), 1);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), *tokenizer_.id_of("<｜Assistant｜>")), 0);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), *tokenizer_.id_of(format_.bos_token)), 1);
}

TEST_F(Chat, RefusesUnknownTemplateAndRole) {
  try {
    rendered({{"robot", "x"}});
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
  }
  format_.style = ChatStyle::kUnknown;
  try {
    rendered(kTurns);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
  }
}

}  // namespace
}  // namespace snapmla::model
