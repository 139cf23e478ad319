// Reading tokenizer.json.
#include <algorithm>
#include <array>

#include "base/check.h"
#include "model/tokenizer_impl.h"
#include "model/utf8.h"

namespace snapmla {
namespace {

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

}  // namespace

using model::JsonObject;

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

void Tokenizer::Impl::read(const JsonObject& json) {
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
  read_vocab(bpe);
  read_merges(bpe);
  read_added(json);
  read_post_processor(json);
  ignore_merges = bpe.boolean_or("ignore_merges", false);
  fuse_unknown = bpe.boolean_or("fuse_unk", false);
  if (bpe.has("unk_token")) {
    const auto token = id_of_token.find(bpe.string("unk_token"));
    if (token == id_of_token.end()) bpe.refuse("unk_token", "a token of the vocabulary");
    unknown = token->second;
  }
  steps = model::build_pre_tokenizer(json, file);
}

Tokenizer Tokenizer::load(const std::filesystem::path& model_dir) {
  const std::filesystem::path path = model_dir / "tokenizer.json";
  return parse(model::read_text(path, kMaxFile), path.string());
}

Tokenizer Tokenizer::parse(std::string_view text, const std::string& file) {
  const nlohmann::json value = model::parse_json(text, file);
  auto impl = std::make_unique<Impl>();
  impl->file = file;
  impl->read(JsonObject(value, file));
  return Tokenizer(std::move(impl));
}

}  // namespace snapmla
