#include "model/tokenizer.h"

#include <algorithm>
#include <array>
#include <queue>
#include <unordered_map>

#include "base/check.h"
#include "model/json.h"
#include "model/pre_tokenizer.h"
#include "model/utf8.h"

namespace snapmla {
namespace {

using model::JsonObject;

constexpr std::int64_t kMaxFile = 256 << 20;
constexpr std::int64_t kMaxId = 1 << 24;
constexpr std::size_t kMaxMerges = 4'000'000;
constexpr std::size_t kMaxTokenBytes = 4096;

// ByteLevel writes every byte as a printable character: printable Latin-1 stands for itself, the
// others follow from U+0100 on, in order.
std::array<std::uint32_t, 256> byte_characters() {
  std::array<std::uint32_t, 256> table{};
  std::uint32_t next = 256;
  for (std::uint32_t b = 0; b < 256; ++b) {
    const bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    table[b] = printable ? b : next++;
  }
  return table;
}

struct AddedToken {
  std::string content;
  std::int32_t id = 0;
  bool special = false, lstrip = false, rstrip = false, single_word = false;
  // Looked for only in what the others left (with a normaliser it would see normalised text).
  bool normalized = false;
};

std::uint64_t pair_key(std::int32_t a, std::int32_t b) {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(a)) << 32) |
         static_cast<std::uint32_t>(b);
}

struct Merge {
  std::int32_t rank = 0, result = 0;
};

// The character at the start of s, which is valid UTF-8 and not empty.
std::uint32_t code_point(std::string_view s) {
  const auto byte = [&s](int i) {
    return static_cast<std::uint32_t>(static_cast<unsigned char>(s[static_cast<std::size_t>(i)]));
  };
  const int length = model::utf8_length(s);
  if (length <= 1) return byte(0);
  std::uint32_t code = byte(0) & (0xffu >> (length + 1));
  for (int i = 1; i < length; ++i) code = (code << 6) | (byte(i) & 0x3fu);
  return code;
}

// Where the last character of s begins; s is valid UTF-8 and not empty.
std::size_t last_character(std::string_view s) {
  std::size_t at = s.size() - 1;
  while (at > 0 && (static_cast<unsigned char>(s[at]) & 0xc0) == 0x80) --at;
  return at;
}

// Unicode's White_Space.
bool is_space(std::uint32_t c) {
  return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

}  // namespace

struct Tokenizer::Impl {
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

  void read_vocab(const JsonObject& bpe);
  void read_merges(const JsonObject& bpe);
  void read_added(const JsonObject& json);
  void check_conflicts(const AddedToken& t) const;
  void read_post_processor(const JsonObject& json);
  void set(std::int32_t id, std::string value, bool is_special);
  std::string from_byte_level(const std::string& token) const;
  void encode_plain(std::string_view text, std::vector<std::int32_t>& ids) const;
  void encode_piece(std::string_view piece, std::vector<std::int32_t>& ids) const;
  void encode_added(std::string_view text, bool normalized, std::vector<std::int32_t>& ids) const;
  const AddedToken* added_at(std::string_view text, std::size_t at, bool normalized) const;
  bool is_word(std::string_view character) const;
};

void Tokenizer::Impl::set(std::int32_t id, std::string value, bool is_special) {
  const auto index = static_cast<std::size_t>(id);
  if (bytes.size() <= index) {
    bytes.resize(index + 1);
    special.resize(index + 1, false);
  }
  bytes[index] = std::move(value);
  special[index] = is_special;
}

std::string Tokenizer::Impl::from_byte_level(const std::string& token) const {
  static const std::unordered_map<std::uint32_t, char> bytes_of = [] {
    std::unordered_map<std::uint32_t, char> map;
    const auto characters = byte_characters();
    for (std::size_t b = 0; b < 256; ++b) map.emplace(characters[b], static_cast<char>(b));
    return map;
  }();
  std::string out;
  for (std::string_view rest = token; !rest.empty();) {
    const int length = model::utf8_length(rest);
    std::uint32_t code = length <= 1
                             ? static_cast<unsigned char>(rest[0]) & 0x7fu
                             : static_cast<unsigned char>(rest[0]) & (0xffu >> (length + 1));
    for (int i = 1; i < length; ++i)
      code = (code << 6) | (static_cast<unsigned char>(rest[static_cast<std::size_t>(i)]) & 0x3fu);
    const auto it = bytes_of.find(code);
    if (length <= 0 || it == bytes_of.end()) {
      throw Error(ErrorCode::kInvalidFile,
                  file + ": model.vocab: token '" + token.substr(0, 60) +
                      "' holds a character outside the byte-level alphabet");
    }
    out += it->second;
    rest.remove_prefix(static_cast<std::size_t>(length));
  }
  return out;
}

void Tokenizer::Impl::read_vocab(const JsonObject& bpe) {
  const nlohmann::json& vocab = bpe.raw("vocab");
  if (!vocab.is_object() || vocab.empty()) bpe.refuse("vocab", "an object of tokens and ids");
  for (const auto& [token, id] : vocab.items()) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= static_cast<std::uint64_t>(kMaxId)) {
      throw Error(ErrorCode::kInvalidFile, str(file, ": model.vocab['", token.substr(0, 60),
                                               "']: accepted are ids from 0 to ", kMaxId - 1));
    }
    if (token.empty() || token.size() > kMaxTokenBytes) {
      throw Error(ErrorCode::kInvalidFile, str(file, ": model.vocab: got a token of ", token.size(),
                                               " bytes, accepted are 1 to ", kMaxTokenBytes));
    }
    const auto value = id.get<std::int32_t>();
    if (static_cast<std::size_t>(value) < bytes.size() &&
        !bytes[static_cast<std::size_t>(value)].empty()) {
      throw Error(ErrorCode::kInvalidFile,
                  str(file, ": model.vocab: id ", value, " is given to two tokens"));
    }
    id_of_token.emplace(token, value);
    std::string raw;
    try {
      raw = from_byte_level(token);
    } catch (const Error&) {
      raw = token;  // an added token that is listed in the vocabulary too
    }
    id_of_bytes.emplace(raw, value);
    set(value, std::move(raw), false);
  }
  const auto characters = byte_characters();
  for (std::size_t b = 0; b < 256; ++b) {
    std::string character;
    model::append_utf8(characters[b], character);
    const auto it = id_of_token.find(character);
    byte_id[b] = it == id_of_token.end() ? -1 : it->second;
  }
}

void Tokenizer::Impl::read_merges(const JsonObject& bpe) {
  const nlohmann::json& list = bpe.raw("merges");
  if (!list.is_array() || list.size() > kMaxMerges)
    bpe.refuse("merges", str("a list of at most ", kMaxMerges, " merges"));
  std::int32_t rank = 0;
  for (const nlohmann::json& item : list) {
    std::string left, right;
    if (item.is_string()) {
      const auto text = item.get<std::string>();
      const std::size_t space = text.find(' ');
      if (space == std::string::npos)
        throw Error(ErrorCode::kInvalidFile,
                    str(file, ": model.merges[", rank, "]: accepted is 'left right'"));
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else if (item.is_array() && item.size() == 2 && item[0].is_string() && item[1].is_string()) {
      left = item[0].get<std::string>();
      right = item[1].get<std::string>();
    } else {
      throw Error(ErrorCode::kInvalidFile, str(file, ": model.merges[", rank,
                                               "]: accepted are 'left right' and [left, right]"));
    }
    const auto a = id_of_token.find(left), b = id_of_token.find(right),
               c = id_of_token.find(left + right);
    if (a == id_of_token.end() || b == id_of_token.end() || c == id_of_token.end()) {
      throw Error(ErrorCode::kInvalidFile,
                  str(file, ": model.merges[", rank, "]: '", left.substr(0, 60), "' + '",
                      right.substr(0, 60), "' names a token outside the vocabulary"));
    }
    merges.try_emplace(pair_key(a->second, b->second), Merge{rank, c->second});
    ++rank;
  }
}

// One id has one text, and one text one id. (A vocabulary may list its added tokens too.)
void Tokenizer::Impl::check_conflicts(const AddedToken& t) const {
  const auto index = static_cast<std::size_t>(t.id);
  const auto same = id_of_token.find(t.content);
  if (same != id_of_token.end() && same->second != t.id) {
    throw Error(ErrorCode::kInvalidFile,
                str(file, ": added_tokens: '", t.content.substr(0, 60), "' has the ids ",
                    same->second, " and ", t.id, ", accepted is one"));
  }
  if (same == id_of_token.end() && index < bytes.size() && !bytes[index].empty()) {
    throw Error(ErrorCode::kInvalidFile,
                str(file, ": added_tokens: id ", t.id, " of '", t.content.substr(0, 60),
                    "' belongs to another token already"));
  }
}

void Tokenizer::Impl::read_added(const JsonObject& json) {
  if (!json.has("added_tokens")) return;
  const nlohmann::json& list = json.raw("added_tokens");
  if (!list.is_array() || list.size() > 100'000)
    json.refuse("added_tokens", "a list of at most 100000 tokens");
  for (const nlohmann::json& item : list) {
    const JsonObject token(item, file, "added_tokens");
    AddedToken t;
    t.content = token.string("content");
    if (t.content.empty() || t.content.size() > kMaxTokenBytes)
      token.refuse("content", str("1 to ", kMaxTokenBytes, " bytes"));
    t.id = static_cast<std::int32_t>(token.integer("id", 0, kMaxId - 1));
    t.special = token.boolean_or("special", false);
    t.lstrip = token.boolean_or("lstrip", false);
    t.rstrip = token.boolean_or("rstrip", false);
    t.single_word = token.boolean_or("single_word", false);
    t.normalized = token.boolean_or("normalized", !t.special);
    check_conflicts(t);
    set(t.id, t.content, t.special);
    auto& starts = t.normalized ? normalized_starts : added_starts;
    starts[static_cast<unsigned char>(t.content[0])] = true;
    id_of_token[t.content] = t.id;
    added.push_back(std::move(t));
  }
  std::stable_sort(added.begin(), added.end(), [](const AddedToken& a, const AddedToken& b) {
    return a.content.size() > b.content.size();
  });
}

// Only the form that adds fixed tokens around one sequence is known.
void Tokenizer::Impl::read_post_processor(const JsonObject& json) {
  if (!json.has("post_processor")) return;
  std::vector<JsonObject> steps_found = {json.object("post_processor")};
  if (steps_found[0].string("type") == "Sequence") {
    const nlohmann::json& list = steps_found[0].raw("processors");
    if (!list.is_array() || list.size() > 16)
      steps_found[0].refuse("processors", "a list of at most 16");
    steps_found.clear();
    for (const nlohmann::json& item : list) steps_found.emplace_back(item, file, "post_processor");
  }
  for (const JsonObject& step : steps_found) {
    const std::string type = step.string("type");
    if (type == "ByteLevel") continue;
    if (type != "TemplateProcessing") {
      throw Error(ErrorCode::kUnsupported, file + ": post_processor.type: got '" + type +
                                               "', accepted are TemplateProcessing and ByteLevel");
    }
    const nlohmann::json& single = step.raw("single");
    if (!single.is_array()) step.refuse("single", "a list");
    bool after = false;
    for (const nlohmann::json& item : single) {
      if (item.is_object() && item.contains("Sequence")) {
        after = true;
      } else if (item.is_object() && item.contains("SpecialToken") &&
                 item["SpecialToken"].is_object() && item["SpecialToken"].contains("id") &&
                 item["SpecialToken"]["id"].is_string()) {
        const auto it = id_of_token.find(item["SpecialToken"]["id"].get<std::string>());
        if (it == id_of_token.end()) step.refuse("single", "special tokens of the vocabulary");
        (after ? suffix : prefix).push_back(it->second);
      } else {
        step.refuse("single", "Sequence and SpecialToken items");
      }
    }
  }
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::load(const std::filesystem::path& model_dir) {
  const std::filesystem::path path = model_dir / "tokenizer.json";
  return parse(model::read_text(path, kMaxFile), path.string());
}

Tokenizer Tokenizer::parse(std::string_view text, const std::string& file) {
  const nlohmann::json value = model::parse_json(text, file);
  const JsonObject json(value, file);
  auto impl = std::make_unique<Impl>();
  impl->file = file;
  const JsonObject bpe = json.object("model");
  if (bpe.string_or("type", "BPE") != "BPE") bpe.refuse("type", "BPE");
  if (bpe.boolean_or("byte_fallback", false)) bpe.refuse("byte_fallback", "false");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!bpe.string_or(key, "").empty()) bpe.refuse(key, "nothing");
  }
  if (json.has("normalizer")) {
    const JsonObject normalizer = json.object("normalizer");
    const bool nothing =
        normalizer.string("type") == "Sequence" && normalizer.raw("normalizers").empty();
    if (!nothing) {
      throw Error(ErrorCode::kUnsupported,
                  file + ": normalizer: got '" + normalizer.string("type") + "', accepted is none");
    }
  }
  impl->read_vocab(bpe);
  impl->read_merges(bpe);
  impl->read_added(json);
  impl->read_post_processor(json);
  impl->ignore_merges = bpe.boolean_or("ignore_merges", false);
  impl->fuse_unknown = bpe.boolean_or("fuse_unk", false);
  if (bpe.has("unk_token")) {
    const auto unknown = impl->id_of_token.find(bpe.string("unk_token"));
    if (unknown == impl->id_of_token.end()) bpe.refuse("unk_token", "a token of the vocabulary");
    impl->unknown = unknown->second;
  }
  impl->steps = model::build_pre_tokenizer(json, file);
  return Tokenizer(std::move(impl));
}

// Merges by rank with a priority queue over neighbours: n log n, also for a piece of a million
// bytes.
void Tokenizer::Impl::encode_piece(std::string_view piece, std::vector<std::int32_t>& ids) const {
  if (ignore_merges) {
    const auto whole = id_of_bytes.find(std::string(piece));
    if (whole != id_of_bytes.end()) {
      ids.push_back(whole->second);
      return;
    }
  }
  struct Node {
    std::int32_t id, previous, next;
  };
  std::vector<Node> nodes;
  bool after_unknown = false;
  for (std::size_t at = 0; at < piece.size(); ++at) {
    const auto byte = static_cast<unsigned char>(piece[at]);
    std::int32_t id = byte_id[byte];
    if (id < 0 && unknown < 0) {
      throw Error(ErrorCode::kInvalidArgument,
                  str(file, ": the vocabulary has no token for byte ", static_cast<int>(byte),
                      " of the text, and no unk_token"));
    }
    const bool is_unknown = id < 0, fused = is_unknown && after_unknown && fuse_unknown;
    after_unknown = is_unknown;
    if (fused) continue;
    if (is_unknown) id = unknown;
    const auto index = static_cast<std::int32_t>(nodes.size());
    nodes.push_back({id, index - 1, index + 1});
  }
  if (nodes.empty()) return;  // nothing but an empty piece
  nodes.back().next = -1;
  struct Candidate {
    std::int32_t rank, left, left_id, right_id, result;
    bool operator<(const Candidate& other) const {  // smallest rank first, then leftmost
      return rank != other.rank ? rank > other.rank : left > other.left;
    }
  };
  std::priority_queue<Candidate> queue;
  const auto consider = [&](std::int32_t left) {
    if (left < 0) return;
    const Node& a = nodes[static_cast<std::size_t>(left)];
    if (a.next < 0) return;
    const Node& b = nodes[static_cast<std::size_t>(a.next)];
    const auto it = merges.find(pair_key(a.id, b.id));
    if (it != merges.end()) queue.push({it->second.rank, left, a.id, b.id, it->second.result});
  };
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(nodes.size()); ++i) consider(i);
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Node& a = nodes[static_cast<std::size_t>(top.left)];
    if (a.id != top.left_id || a.next < 0) continue;  // merged away meanwhile
    Node& b = nodes[static_cast<std::size_t>(a.next)];
    if (b.id != top.right_id) continue;
    a.id = top.result;
    b.id = -1;
    a.next = b.next;
    if (b.next >= 0) nodes[static_cast<std::size_t>(b.next)].previous = top.left;
    consider(top.left);
    consider(a.previous);
  }
  for (std::int32_t i = 0; i >= 0; i = nodes[static_cast<std::size_t>(i)].next) {
    ids.push_back(nodes[static_cast<std::size_t>(i)].id);
  }
}

void Tokenizer::Impl::encode_plain(std::string_view text, std::vector<std::int32_t>& ids) const {
  if (text.empty()) return;
  std::vector<std::string_view> pieces = {text}, next;
  for (const model::SplitStep& step : steps) {
    next.clear();
    for (std::string_view piece : pieces) step.split(piece, next);
    pieces.swap(next);
  }
  for (std::string_view piece : pieces) encode_piece(piece, ids);
}

// Letters, marks, digits and connectors: \w of the tokenizers library.
bool Tokenizer::Impl::is_word(std::string_view character) const {
  static const model::SplitStep word(
      R"([\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{200c}\x{200d}\x{24b6}-\x{24e9}])", "word characters",
      model::SplitBehavior::kRemoved);
  std::vector<std::string_view> left;
  word.split(character, left);
  return left.empty();
}

// The longest added token at `at`. One that must stand alone as a word and does not hides shorter
// ones: the caller gets it with `single_word` still to be checked.
const AddedToken* Tokenizer::Impl::added_at(std::string_view text, std::size_t at,
                                            bool normalized) const {
  for (const AddedToken& t : added) {
    if (t.normalized == normalized && text.compare(at, t.content.size(), t.content) == 0) return &t;
  }
  return nullptr;
}

// First the tokens that are looked for in the text itself, then, between them, the "normalized"
// ones.
void Tokenizer::Impl::encode_added(std::string_view text, bool normalized,
                                   std::vector<std::int32_t>& ids) const {
  const std::array<bool, 256>& starts = normalized ? normalized_starts : added_starts;
  const auto encode_rest = [&](std::string_view rest) {
    if (normalized) {
      encode_plain(rest, ids);
    } else if (!rest.empty()) {
      encode_added(rest, true, ids);
    }
  };
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size();) {
    const AddedToken* token =
        starts[static_cast<unsigned char>(text[at])] ? added_at(text, at, normalized) : nullptr;
    if (!token) {
      ++at;
      continue;
    }
    std::size_t before = at, after = at + token->content.size();
    at = after;
    if (token->single_word) {
      const std::string_view left = text.substr(0, before), right = text.substr(after);
      if (!left.empty() && is_word(left.substr(last_character(left)))) continue;
      if (!right.empty() &&
          is_word(right.substr(0, static_cast<std::size_t>(model::utf8_length(right)))))
        continue;
    }
    while (token->lstrip && before > done) {
      const std::size_t last = last_character(text.substr(0, before));
      if (last < done || !is_space(code_point(text.substr(last)))) break;
      before = last;
    }
    while (token->rstrip && after < text.size() && is_space(code_point(text.substr(after))))
      after += static_cast<std::size_t>(model::utf8_length(text.substr(after)));
    encode_rest(text.substr(done, before - done));
    ids.push_back(token->id);
    done = at = after;
  }
  encode_rest(text.substr(done));
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool parse_special,
                                            bool add_special) const {
  const std::string valid = model::to_valid_utf8(text);
  std::vector<std::int32_t> ids;
  if (add_special) ids = impl_->prefix;
  if (parse_special) {
    impl_->encode_added(valid, false, ids);
  } else {
    impl_->encode_plain(valid, ids);
  }
  if (add_special) ids.insert(ids.end(), impl_->suffix.begin(), impl_->suffix.end());
  return ids;
}

std::string Tokenizer::token_bytes(std::int32_t id, bool skip_special) const {
  if (id < 0 || id >= vocab_size() || (skip_special && is_special(id))) return "";
  return impl_->bytes[static_cast<std::size_t>(id)];
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const {
  std::string bytes;
  for (std::int32_t id : ids) bytes += token_bytes(id, skip_special);
  return model::to_valid_utf8(bytes);
}

std::int64_t Tokenizer::vocab_size() const {
  return static_cast<std::int64_t>(impl_->bytes.size());
}

std::optional<std::int32_t> Tokenizer::id_of(const std::string& token) const {
  const auto it = impl_->id_of_token.find(token);
  return it == impl_->id_of_token.end() ? std::nullopt : std::optional(it->second);
}

bool Tokenizer::is_special(std::int32_t id) const {
  return id >= 0 && id < vocab_size() && impl_->special[static_cast<std::size_t>(id)];
}

std::string StreamDecoder::push(std::int32_t id) {
  pending_ += tokenizer_.token_bytes(id);
  // At most three bytes can be the beginning of a character that is not complete.
  std::size_t keep = 0;
  for (std::size_t n = 1; n <= std::min<std::size_t>(3, pending_.size()); ++n) {
    if (model::utf8_length(std::string_view(pending_).substr(pending_.size() - n)) == -1) keep = n;
  }
  const std::string ready = pending_.substr(0, pending_.size() - keep);
  pending_.erase(0, ready.size());
  return model::to_valid_utf8(ready);
}

std::string StreamDecoder::finish() {
  const std::string rest = model::to_valid_utf8(pending_);
  pending_.clear();
  return rest;
}

}  // namespace snapmla
