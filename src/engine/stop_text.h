// Generated tokens to text: valid UTF-8 at every step, cut before the first stop string.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model/tokenizer.h"

namespace snapmla::engine {

class StopText {
 public:
  // tokenizer may be null (a checkpoint without one): then there is no text.
  StopText(const Tokenizer* tokenizer, std::vector<std::string> stop);

  // Text that can be shown now: whole characters that cannot be the start of a stop string.
  std::string push(std::int32_t token);
  // What was held back, at the end of generation.
  std::string finish();

  bool stopped() const { return stopped_; }
  const std::string& text() const { return shown_; }

 private:
  std::string advance(const std::string& more, bool final);

  std::unique_ptr<StreamDecoder> decoder_;
  std::vector<std::string> stop_;
  std::string held_;  // decoded, not yet shown
  std::string shown_;
  bool stopped_ = false;
};

}  // namespace snapmla::engine
