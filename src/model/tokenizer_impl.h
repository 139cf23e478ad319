// What a Tokenizer holds: tokenizer_file.cpp fills it from tokenizer.json, tokenizer.cpp encodes
// and decodes with it.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "model/json.h"
#include "model/pre_tokenizer.h"
#include "model/tokenizer.h"

namespace snapmla {

struct Tokenizer::Impl {
  struct AddedToken {
    std::string content;
    std::int32_t id = 0;
    bool special = false, lstrip = false, rstrip = false, single_word = false;
    // Looked for only in what the others left (with a normaliser it would see normalised text).
    bool normalized = false;
  };
  struct Merge {
    std::int32_t rank = 0, result = 0;
  };

  std::string file;
  std::vector<std::string> bytes;  // of each id; empty where there is none
  std::vector<bool> special;
  std::unordered_map<std::string, std::int32_t> id_of_token;  // as written in the file
  std::unordered_map<std::string, std::int32_t> id_of_bytes;
  std::unordered_map<std::uint64_t, Merge> merges;
  std::array<std::int32_t, 256> byte_id{};
  std::int32_t unknown = -1;      // for a byte that the vocabulary lacks
  bool fuse_unknown = false;      // several of them in a row count as one
  std::vector<AddedToken> added;  // longest first
  std::array<bool, 256> added_starts{}, normalized_starts{};  // first bytes
  std::vector<model::SplitStep> steps;
  std::vector<std::int32_t> prefix, suffix;  // of the post-processor
  bool ignore_merges = false;

  // The key of two neighbours in `merges`.
  static std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
    return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) |
           static_cast<std::uint32_t>(right);
  }

  // tokenizer_file.cpp; errors name the file and the field.
  void read(const model::JsonObject& json);
  void read_vocab(const model::JsonObject& bpe);
  void read_merges(const model::JsonObject& bpe);
  void read_added(const model::JsonObject& json);
  void check_conflicts(const AddedToken& t) const;
  void read_post_processor(const model::JsonObject& json);
  void set(std::int32_t id, std::string value, bool is_special);
  std::string from_byte_level(const std::string& token) const;

  // tokenizer.cpp
  void encode_plain(std::string_view text, std::vector<std::int32_t>& ids) const;
  void encode_piece(std::string_view piece, std::vector<std::int32_t>& ids) const;
  void encode_added(std::string_view text, bool normalized, std::vector<std::int32_t>& ids) const;
  const AddedToken* added_at(std::string_view text, std::size_t at, bool normalized) const;
  bool is_word(std::string_view character) const;
};

}  // namespace snapmla
