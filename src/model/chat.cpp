#include "model/chat.h"

#include "base/check.h"
#include "model/json.h"

namespace snapmla::model {
namespace {

constexpr const char* kUser = "<｜User｜>";
constexpr const char* kAssistant = "<｜Assistant｜>";
constexpr const char* kThinkEnd = "</think>";

// Collects text and control tokens. Neighbouring texts are tokenised as one, as the template's
// output would be; only control() can produce a control token.
class PromptBuilder {
 public:
  explicit PromptBuilder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void text(const std::string& s) { pending_ += s; }

  void control(const std::string& token) {
    const auto id = tokenizer_.id_of(token);
    if (!id) {
      throw Error(ErrorCode::kInvalidFile,
                  "tokenizer.json: the chat format needs the token '" + token + "'");
    }
    flush();
    ids_.push_back(*id);
  }

  // A marker that some checkpoints have as one token and others as plain text.
  void control_or_text(const std::string& token) {
    if (tokenizer_.id_of(token)) {
      control(token);
    } else {
      text(token);
    }
  }

  std::vector<std::int32_t> finish() {
    flush();
    return std::move(ids_);
  }

 private:
  void flush() {
    if (pending_.empty()) return;
    const auto ids = tokenizer_.encode(pending_, false, false);
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    pending_.clear();
  }

  const Tokenizer& tokenizer_;
  std::string pending_;
  std::vector<std::int32_t> ids_;
};

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

ChatStyle recognise(const std::string& text) {
  if (contains(text, kUser) && contains(text, kAssistant)) {
    if (contains(text, "m['content'] + '\n\n'") || contains(text, "m['content'] + '\\n\\n'"))
      return ChatStyle::kEmbedded;
    if (contains(text, "thinking")) return ChatStyle::kV31;
    if (contains(text, "<think>")) return ChatStyle::kR1;
    return ChatStyle::kV3;
  }
  if (contains(text, "'User: '") && contains(text, "'Assistant: '")) return ChatStyle::kV2;
  return ChatStyle::kUnknown;
}

// "bos_token" is a string or an added-token object.
std::string token_name(const JsonObject& json, const char* key) {
  if (!json.has(key)) return "";
  return json.raw(key).is_object() ? json.object(key).string("content") : json.string(key);
}

std::string without_thinking(const std::string& content) {
  const std::size_t at = content.rfind(kThinkEnd);
  return at == std::string::npos ? content
                                 : content.substr(at + std::string_view(kThinkEnd).size());
}

void check_roles(std::span<const ChatMessage> messages) {
  for (const ChatMessage& m : messages) {
    if (m.role != "system" && m.role != "user" && m.role != "assistant") {
      throw Error(ErrorCode::kInvalidArgument,
                  "messages.role: got '" + m.role + "', accepted are system, user and assistant");
    }
  }
}

void add_v2(PromptBuilder& out, const ChatFormat& format, std::span<const ChatMessage> messages,
            bool add_generation_prompt) {
  for (const ChatMessage& m : messages) {
    if (m.role == "assistant") {
      out.text("Assistant: " + m.content);
      out.control(format.eos_token);
    } else {
      out.text((m.role == "user" ? "User: " : "") + m.content + "\n\n");
    }
  }
  if (add_generation_prompt) out.text("Assistant:");
}

void add_v3(PromptBuilder& out, const ChatFormat& format, std::span<const ChatMessage> messages,
            bool add_generation_prompt) {
  const bool embedded = format.style == ChatStyle::kEmbedded;
  if (!embedded) {  // systems come first, joined
    bool first = true;
    for (const ChatMessage& m : messages) {
      if (m.role != "system") continue;
      out.text((first ? "" : "\n\n") + m.content);
      first = false;
    }
  }
  const bool cuts = format.style == ChatStyle::kR1 || format.style == ChatStyle::kV31;
  for (const ChatMessage& m : messages) {
    if (m.role == "user") {
      out.control(kUser);
      out.text(m.content);
    } else if (m.role == "assistant") {
      out.control(kAssistant);
      if (format.style == ChatStyle::kV31) out.control_or_text(kThinkEnd);
      out.text(cuts ? without_thinking(m.content) : m.content);
      out.control(format.eos_token);
    } else if (embedded) {
      out.text(m.content + "\n\n");
    }
  }
  if (!add_generation_prompt) return;
  out.control(kAssistant);
  if (format.style == ChatStyle::kV31) out.control_or_text(kThinkEnd);
  if (format.style == ChatStyle::kR1) {
    out.control_or_text("<think>");
    out.text("\n");
  }
}

}  // namespace

ChatFormat load_chat_format(const std::filesystem::path& model_dir) {
  ChatFormat format;
  std::string text;
  const auto config = model_dir / "tokenizer_config.json";
  if (std::filesystem::exists(config)) {
    const nlohmann::json value = parse_json(read_text(config, 16 << 20), config.string());
    const JsonObject json(value, config.string());
    format.bos_token = token_name(json, "bos_token");
    format.eos_token = token_name(json, "eos_token");
    if (json.has("chat_template")) text = json.string("chat_template");
  }
  const auto jinja = model_dir / "chat_template.jinja";
  if (std::filesystem::exists(jinja)) text = read_text(jinja, 16 << 20);
  format.style = recognise(text);
  return format;
}

void require_known(const ChatFormat& format) {
  if (format.style != ChatStyle::kUnknown) return;
  throw Error(ErrorCode::kUnsupported,
              "chat: the checkpoint's chat template is absent or unknown, known are those of "
              "DeepSeek-V2, V3, R1, V3.1 and the shipped model; plain completion still works");
}

std::vector<std::int32_t> apply_chat_template(const Tokenizer& tokenizer, const ChatFormat& format,
                                              std::span<const ChatMessage> messages,
                                              bool add_generation_prompt) {
  require_known(format);
  check_roles(messages);
  PromptBuilder out(tokenizer);
  out.control(format.bos_token);
  if (format.style == ChatStyle::kV2) {
    add_v2(out, format, messages, add_generation_prompt);
  } else {
    add_v3(out, format, messages, add_generation_prompt);
  }
  return out.finish();
}

}  // namespace snapmla::model
