// The pre-tokeniser chain of tokenizer.json: each step splits the pieces of the one before.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "model/json.h"

namespace snapmla::model {

// What becomes of a match of the pattern, as Hugging Face tokenizers names it: a piece of its own,
// dropped, glued to the piece before or after it, or merged with neighbouring matches.
enum class SplitBehavior : std::uint8_t {
  kIsolated,
  kRemoved,
  kMergedWithPrevious,
  kMergedWithNext,
  kContiguous
};

// One Split step. PCRE2 with match and depth limits: a hostile pattern ends in an error, not in a
// hang.
class SplitStep {
 public:
  // invert: what lies between the matches takes the part of the matches, and the other way round.
  SplitStep(const std::string& pattern, const std::string& file,
            SplitBehavior behavior = SplitBehavior::kIsolated, bool invert = false);
  ~SplitStep();
  SplitStep(SplitStep&&) noexcept;

  // Appends the pieces of `text`, in order and none empty; save for kRemoved their concatenation is
  // `text`. Throws kInvalidArgument past the limits.
  void split(std::string_view text, std::vector<std::string_view>& pieces) const;

 private:
  struct Impl;
  struct Part {
    std::size_t begin, end;
    bool match;
  };
  std::vector<Part> parts(std::string_view text) const;

  std::unique_ptr<Impl> impl_;
  SplitBehavior behavior_;
  bool invert_;
};

// Split(Regex or String), Digits, ByteLevel(use_regex false or true) and Sequences of them.
std::vector<SplitStep> build_pre_tokenizer(const JsonObject& tokenizer, const std::string& file);

}  // namespace snapmla::model
