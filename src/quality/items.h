// What an evaluation runs on: a stream of text tokens, and task items.
//
// Text: a UTF-8 file, one document; or *.jsonl, one {"text": ...} per line, a document each (other
// fields are ignored). Documents follow each other, each with the BOS that the tokenizer adds and
// the checkpoint's end token.
//
// Items: JSON lines. One item is an object:
//
//   "id"        any string, unique in the file
//   "kind"      how reports group it, with "size": a number, in tokens or whatever the kind counts
//   "depth"     optional, 0 to 1: where the thing asked for lies
//   "counts"    "first": the item is right when its first answer is; "whole" (default): when all
//   are "length"    with fills: tokens of the whole item "start"     with fills: where in the text
//   stream the filling begins, 0 to 1 "segments"  what the model is given and what it has to write,
//   in order:
//               {"given": TEXT} | {"answer": TEXT} | {"fill": SHARE}
//
// Segments are tokenised one by one, added tokens included, without BOS. Fills are text from the
// stream, one piece after the other; together they make up `length`, by their shares, each piece
// cut back to its last line end where it has one.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "model/tokenizer.h"

namespace snapmla::quality {

// Throws kNotFound, kIo, kInvalidFile (naming file and line).
std::vector<std::int32_t> read_text(const std::string& path, const Tokenizer& tokenizer,
                                    std::optional<std::int32_t> end_token);

struct Answer {
  std::int64_t begin = 0, end = 0;  // tokens of the item
};

struct Item {
  std::string id, kind;
  double size = 0;
  std::optional<double> depth;
  bool counts_first = false;
  std::vector<std::int32_t> tokens;
  std::vector<Answer> answers;  // in order, not empty
};

// `stream`: for fills. limit: the longest item accepted, in tokens. Throws kNotFound, kIo,
// kInvalidFile with file, line, field, what was got and what is accepted.
std::vector<Item> read_items(const std::string& path, const Tokenizer& tokenizer,
                             std::span<const std::int32_t> stream, std::int64_t limit);
// The same for text in memory; `path` for messages.
std::vector<Item> parse_items(const std::string& text, const std::string& path,
                              const Tokenizer& tokenizer, std::span<const std::int32_t> stream,
                              std::int64_t limit);

// At most `limit` (0: all) items of each (kind, size), the first ones.
std::vector<Item> first_of_each(std::vector<Item> items, std::int64_t limit);

// Contents of a file. Throws kNotFound, kIo.
std::string read_bytes(const std::string& path);
// 64 bits that tell contents apart (FNV-1a), in hexadecimal.
std::string fingerprint(const std::string& bytes);

}  // namespace snapmla::quality
