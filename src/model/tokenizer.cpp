// Text to ids and back.
#include "model/tokenizer.h"

#include <algorithm>
#include <queue>

#include "base/check.h"
#include "model/tokenizer_impl.h"
#include "model/utf8.h"

namespace snapmla {
namespace {

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

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;

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
const Tokenizer::Impl::AddedToken* Tokenizer::Impl::added_at(std::string_view text, std::size_t at,
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
