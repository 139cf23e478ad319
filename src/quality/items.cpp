#include "quality/items.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "base/check.h"

namespace snapmla::quality {
namespace {

using Json = nlohmann::json;

// Lines of a JSONL file with what errors need.
struct Line {
  const std::string& path;
  std::int64_t number;
  Json value;

  [[noreturn]] void refuse(const std::string& what) const {
    throw Error(ErrorCode::kInvalidFile, str(path, ":", number, ": ", what));
  }
  const Json& field(const Json& object, const char* name) const {
    const auto at = object.find(name);
    if (at == object.end()) refuse(str("'", name, "' is missing"));
    return *at;
  }
  std::string text(const Json& object, const char* name) const {
    const Json& x = field(object, name);
    if (!x.is_string()) refuse(str("'", name, "': got ", x.dump(), ", accepted is a string"));
    return x.get<std::string>();
  }
  double number_in(const Json& object, const char* name, double low, double high) const {
    const Json& x = field(object, name);
    if (!x.is_number() || x.get<double>() < low || x.get<double>() > high) {
      refuse(
          str("'", name, "': got ", x.dump(), ", accepted is a number from ", low, " to ", high));
    }
    return x.get<double>();
  }
};

template <class Fn>
void each_line(const std::string& text, const std::string& path, const Fn& fn) {
  std::int64_t number = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string line = text.substr(at, end - at);
    at = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    Line parsed{path, number, Json::parse(line, nullptr, false)};
    if (!parsed.value.is_object()) parsed.refuse("accepted is one JSON object per line");
    fn(parsed);
  }
}

struct Fill {
  double share;
  std::size_t at;  // position in the item, before any filling
};

// Puts the pieces of text where they belong and moves the answers that follow.
void fill(Item& item, const std::vector<Fill>& fills, const Line& line, const Tokenizer& tokenizer,
          std::span<const std::int32_t> stream) {
  const double start = line.number_in(line.value, "start", 0, 1);
  const auto length = static_cast<std::int64_t>(line.number_in(line.value, "length", 1, 1e9));
  const std::int64_t free = length - static_cast<std::int64_t>(item.tokens.size());
  double total = 0;
  for (const Fill& f : fills) total += f.share;
  if (free < 0 || total > 1.0 + 1e-9) {
    line.refuse(str("'fill': got shares of ", total, " and ", item.tokens.size(),
                    " other tokens of length ", length,
                    ", accepted are shares of at most 1 and room for them"));
  }
  if (static_cast<std::int64_t>(stream.size()) < free) {
    line.refuse(str("'fill': got ", stream.size(),
                    " tokens of text (--text), accepted are at least ", free));
  }
  std::size_t from = static_cast<std::size_t>(
      start * static_cast<double>(static_cast<std::int64_t>(stream.size()) - free));
  std::vector<std::int32_t> tokens;
  std::size_t done = 0;
  std::vector<std::int64_t> moved(item.tokens.size() + 1, 0);
  std::int64_t added = 0;
  const auto copy_to = [&](std::size_t end) {
    for (; done < end; ++done) {
      moved[done] = added;
      tokens.push_back(item.tokens[done]);
    }
  };
  for (const Fill& f : fills) {
    copy_to(f.at);
    auto count = static_cast<std::size_t>(f.share * static_cast<double>(free));
    const auto piece = stream.subspan(from, count);
    from += count;
    for (std::size_t keep = count; keep > 0; --keep) {
      if (tokenizer.token_bytes(piece[keep - 1]).ends_with('\n')) {
        count = keep;
        break;
      }
    }
    tokens.insert(tokens.end(), piece.begin(), piece.begin() + static_cast<std::ptrdiff_t>(count));
    added += static_cast<std::int64_t>(count);
  }
  copy_to(item.tokens.size());
  for (Answer& a : item.answers) {
    const std::int64_t shift = moved[static_cast<std::size_t>(a.begin)];
    a.begin += shift;
    a.end += shift;
  }
  item.tokens = std::move(tokens);
}

Item parse_item(const Line& line, const Tokenizer& tokenizer, std::span<const std::int32_t> stream,
                std::int64_t limit) {
  const Json& v = line.value;
  Item item;
  item.id = line.text(v, "id");
  item.kind = line.text(v, "kind");
  item.size = line.number_in(v, "size", 0, 1e9);
  if (v.contains("depth")) item.depth = line.number_in(v, "depth", 0, 1);
  if (v.contains("counts")) {
    const std::string counts = line.text(v, "counts");
    if (counts != "first" && counts != "whole") {
      line.refuse("'counts': got '" + counts + "', accepted are first, whole");
    }
    item.counts_first = counts == "first";
  }
  const Json& segments = line.field(v, "segments");
  if (!segments.is_array()) line.refuse("'segments': accepted is an array");
  std::vector<Fill> fills;
  for (const Json& s : segments) {
    const bool known = s.contains("fill") || s.contains("given") || s.contains("answer");
    if (!s.is_object() || s.size() != 1 || !known) {
      line.refuse("'segments': got " + s.dump() +
                  ", accepted are {\"given\": TEXT}, {\"answer\": TEXT}, {\"fill\": SHARE}");
    }
    if (s.contains("fill")) {
      fills.push_back({line.number_in(s, "fill", 0, 1), item.tokens.size()});
      continue;
    }
    const bool answer = s.contains("answer");
    const auto ids = tokenizer.encode(line.text(s, answer ? "answer" : "given"), true, false);
    const auto begin = static_cast<std::int64_t>(item.tokens.size());
    item.tokens.insert(item.tokens.end(), ids.begin(), ids.end());
    const auto end = static_cast<std::int64_t>(item.tokens.size());
    if (answer && end > begin) item.answers.push_back({begin, end});
  }
  if (!fills.empty()) fill(item, fills, line, tokenizer, stream);
  if (item.answers.empty() || item.answers.front().begin == 0) {
    line.refuse("'segments': accepted is at least one answer, after something that is given");
  }
  if (static_cast<std::int64_t>(item.tokens.size()) > limit) {
    line.refuse(
        str("got an item of ", item.tokens.size(), " tokens, accepted are at most ", limit));
  }
  return item;
}

}  // namespace

std::string read_bytes(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                             &std::fclose);
  const auto refuse = [&](int code) {
    throw Error(code == ENOENT ? ErrorCode::kNotFound : ErrorCode::kIo,
                path + ": cannot be read: " + std::strerror(code));
  };
  if (!file) refuse(errno);
  std::string text;
  char block[1 << 16];
  while (const std::size_t n = std::fread(block, 1, sizeof block, file.get()))
    text.append(block, n);
  if (std::ferror(file.get())) refuse(errno);
  return text;
}

std::string fingerprint(const std::string& bytes) {
  std::uint64_t h = 14695981039346656037ull;
  for (const char c : bytes) h = (h ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(h));
  return text;
}

std::vector<std::int32_t> read_text(const std::string& path, const Tokenizer& tokenizer,
                                    std::optional<std::int32_t> end_token) {
  const std::string bytes = read_bytes(path);
  std::vector<std::int32_t> stream;
  const auto add = [&](const std::string& text) {
    const auto ids = tokenizer.encode(text, false);
    stream.insert(stream.end(), ids.begin(), ids.end());
    if (end_token) stream.push_back(*end_token);
  };
  if (path.ends_with(".jsonl")) {
    each_line(bytes, path, [&](const Line& line) { add(line.text(line.value, "text")); });
  } else {
    add(bytes);
  }
  return stream;
}

std::vector<Item> parse_items(const std::string& text, const std::string& path,
                              const Tokenizer& tokenizer, std::span<const std::int32_t> stream,
                              std::int64_t limit) {
  std::vector<Item> items;
  std::set<std::string> ids;
  each_line(text, path, [&](const Line& line) {
    items.push_back(parse_item(line, tokenizer, stream, limit));
    if (!ids.insert(items.back().id).second) {
      line.refuse("'id': got '" + items.back().id + "' again, accepted is one item for an id");
    }
  });
  return items;
}

std::vector<Item> read_items(const std::string& path, const Tokenizer& tokenizer,
                             std::span<const std::int32_t> stream, std::int64_t limit) {
  return parse_items(read_bytes(path), path, tokenizer, stream, limit);
}

std::vector<Item> first_of_each(std::vector<Item> items, std::int64_t limit) {
  if (limit == 0) return items;
  std::map<std::pair<std::string, double>, std::int64_t> count;
  std::vector<Item> kept;
  for (Item& item : items) {
    if (++count[{item.kind, item.size}] <= limit) kept.push_back(std::move(item));
  }
  return kept;
}

}  // namespace snapmla::quality
