// The pre-tokeniser chain of tokenizer.json: each step splits the pieces of the one before.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "model/json.h"

namespace snapmla::model {

// One Split step. PCRE2 with match and depth limits: a hostile pattern ends in an error, not in a
// hang.
class SplitStep {
 public:
  // invert false, behavior Isolated: matches and what lies between them become pieces.
  SplitStep(const std::string& pattern, const std::string& file);
  ~SplitStep();
  SplitStep(SplitStep&&) noexcept;

  // Appends the pieces of `text`, in order; their concatenation is `text`. Throws kInvalidArgument
  // past the limits.
  void split(std::string_view text, std::vector<std::string_view>& pieces) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Split(Regex or String, Isolated), Digits, ByteLevel(use_regex false or true) and Sequences of
// them.
std::vector<SplitStep> build_pre_tokenizer(const JsonObject& tokenizer, const std::string& file);

}  // namespace snapmla::model
