// tokenizer.json (Hugging Face tokenizers), byte-level BPE: what DeepSeek-family checkpoints and
// the shipped model use. Components outside that family are refused by name, never guessed.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace snapmla {

class Tokenizer {
 public:
  // Reads <model_dir>/tokenizer.json. Throws kNotFound, kInvalidFile (file and field) or
  // kUnsupported.
  static Tokenizer load(const std::filesystem::path& model_dir);
  static Tokenizer parse(std::string_view json, const std::string& file);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;

  // parse_special false: added tokens in the text are plain text (for chat contents, which a user
  // writes). A BOS is added only where the file's post-processor says so and add_special is true.
  // Throws kInvalidArgument when the splitting regex exceeds its limits on this text, and when the
  // text holds a byte that neither the vocabulary nor an unk_token can stand for.
  std::vector<std::int32_t> encode(std::string_view text, bool parse_special = true,
                                   bool add_special = true) const;

  // Bytes of the tokens as valid UTF-8: what is not becomes U+FFFD. Unknown ids are skipped.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special = true) const;

  // The raw bytes of one token, which may be part of a character; empty for special tokens when
  // skipped.
  std::string token_bytes(std::int32_t id, bool skip_special = true) const;

  std::int64_t vocab_size() const;  // largest id + 1
  std::optional<std::int32_t> id_of(const std::string& token) const;
  bool is_special(std::int32_t id) const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Turns a stream of tokens into text, holding back bytes that do not yet form a whole character.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  std::string push(std::int32_t id);
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  std::string pending_;
};

}  // namespace snapmla
