// Chat formats of the DeepSeek family: a conversation to prompt tokens.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "model/tokenizer.h"

namespace snapmla::model {

// kEmbedded: the shipped model's, V3 markers with "\n\n" after every system message, in place.
enum class ChatStyle : std::uint8_t { kUnknown, kV2, kV3, kR1, kV31, kEmbedded };

struct ChatFormat {
  ChatStyle style = ChatStyle::kUnknown;
  std::string bos_token, eos_token;  // as tokenizer_config.json names them
};

struct ChatMessage {
  std::string role;  // system | user | assistant
  std::string content;
};

// Reads tokenizer_config.json and chat_template.jinja (which wins) and recognises the template by
// its markers; templates are never run. An unknown or absent template gives kUnknown. Throws
// kInvalidFile naming file and field.
ChatFormat load_chat_format(const std::filesystem::path& model_dir);

// Throws kUnsupported when the format is kUnknown.
void require_known(const ChatFormat& format);

// The prompt with exactly one BOS. Contents are tokenised with added-token matching off, so that a
// user cannot write a control token. V3.1 is prompted in its non-thinking mode. Throws kUnsupported
// when the format is unknown, kInvalidArgument for another role, kInvalidFile when the tokenizer
// lacks a marker.
std::vector<std::int32_t> apply_chat_template(const Tokenizer& tokenizer, const ChatFormat& format,
                                              std::span<const ChatMessage> messages,
                                              bool add_generation_prompt);

}  // namespace snapmla::model
