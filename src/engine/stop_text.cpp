#include "engine/stop_text.h"

#include <algorithm>
#include <utility>

namespace snapmla::engine {

StopText::StopText(const Tokenizer* tokenizer, std::vector<std::string> stop)
    : decoder_(tokenizer ? std::make_unique<StreamDecoder>(*tokenizer) : nullptr),
      stop_(std::move(stop)) {
  std::erase(stop_, "");
}

std::string StopText::push(std::int32_t token) {
  return decoder_ ? advance(decoder_->push(token), false) : "";
}

std::string StopText::finish() { return decoder_ ? advance(decoder_->finish(), true) : ""; }

std::string StopText::advance(const std::string& more, bool final) {
  if (stopped_) return "";
  held_ += more;
  std::size_t cut = std::string::npos;
  for (const std::string& s : stop_) cut = std::min(cut, held_.find(s));
  std::size_t show = held_.size();
  if (cut != std::string::npos) {
    stopped_ = true;
    show = cut;
  } else if (!final) {
    // Keep back the longest tail that a stop string begins with.
    for (const std::string& s : stop_) {
      for (std::size_t n = std::min(s.size() - 1, held_.size()); n > 0; --n) {
        if (held_.compare(held_.size() - n, n, s, 0, n) == 0) {
          show = std::min(show, held_.size() - n);
          break;
        }
      }
    }
  }
  std::string out = held_.substr(0, show);
  held_.erase(0, show);
  shown_ += out;
  return out;
}

}  // namespace snapmla::engine
