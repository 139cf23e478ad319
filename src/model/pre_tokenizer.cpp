#include "model/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>

#include "base/check.h"

namespace snapmla::model {
namespace {

constexpr std::uint32_t kMatchLimit = 1'000'000;
constexpr std::uint32_t kDepthLimit = 10'000;
constexpr std::size_t kMaxPattern = 64 << 10;

// GPT-2's pattern, which ByteLevel applies when use_regex is true.
constexpr const char* kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

std::string quote(const std::string& literal) {
  std::string out;
  for (char c : literal) {
    if (std::string_view("\\^$.[]|()?*+{}#-").find(c) != std::string_view::npos) out += '\\';
    out += c;
  }
  return out;
}

SplitBehavior behavior_of(const JsonObject& step) {
  const std::string name = step.string_or("behavior", "Isolated");
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  step.refuse("behavior", "Isolated, Removed, MergedWithPrevious, MergedWithNext or Contiguous");
}

void add_step(const JsonObject& step, const std::string& file, std::vector<SplitStep>& steps,
              int depth) {
  const std::string type = step.string("type");
  if (type == "Sequence") {
    const nlohmann::json& list = step.raw("pretokenizers");
    if (!list.is_array() || list.size() > 64 || depth > 4)
      step.refuse("pretokenizers", "a list of at most 64 steps");
    for (const nlohmann::json& item : list)
      add_step(JsonObject(item, file, "pre_tokenizer"), file, steps, depth + 1);
  } else if (type == "Split") {
    const JsonObject pattern = step.object("pattern");
    steps.emplace_back(
        pattern.has("Regex") ? pattern.string("Regex") : quote(pattern.string("String")), file,
        behavior_of(step), step.boolean_or("invert", false));
  } else if (type == "Digits") {
    steps.emplace_back(step.boolean_or("individual_digits", false) ? "\\p{N}" : "\\p{N}+", file);
  } else if (type == "ByteLevel") {
    if (step.boolean_or("add_prefix_space", false)) step.refuse("add_prefix_space", "false");
    if (step.boolean_or("use_regex", true)) steps.emplace_back(kGpt2, file);
  } else {
    throw Error(ErrorCode::kUnsupported,
                file + ": pre_tokenizer.type: got '" + type +
                    "', accepted are Sequence, Split, Digits and ByteLevel");
  }
}

}  // namespace

struct SplitStep::Impl {
  std::string file;  // for error messages
  pcre2_code* code = nullptr;
  pcre2_match_context* context = nullptr;
  ~Impl() {
    pcre2_match_context_free(context);
    pcre2_code_free(code);
  }
};

SplitStep::SplitStep(const std::string& pattern, const std::string& file, SplitBehavior behavior,
                     bool invert)
    : impl_(std::make_unique<Impl>()), behavior_(behavior), invert_(invert) {
  impl_->file = file;
  if (pattern.empty() || pattern.size() > kMaxPattern) {
    throw Error(ErrorCode::kInvalidFile, str(file, ": pre_tokenizer pattern: got ", pattern.size(),
                                             " bytes, accepted are 1 to ", kMaxPattern));
  }
  int error = 0;
  PCRE2_SIZE at = 0;
  impl_->code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &at, nullptr);
  if (!impl_->code) {
    PCRE2_UCHAR message[256];
    pcre2_get_error_message(error, message, sizeof message);
    throw Error(ErrorCode::kInvalidFile, str(file, ": pre_tokenizer pattern: at byte ", at, ": ",
                                             reinterpret_cast<const char*>(message)));
  }
  pcre2_jit_compile(impl_->code, PCRE2_JIT_COMPLETE);
  impl_->context = pcre2_match_context_create(nullptr);
  pcre2_set_match_limit(impl_->context, kMatchLimit);
  pcre2_set_depth_limit(impl_->context, kDepthLimit);
}

SplitStep::~SplitStep() = default;
SplitStep::SplitStep(SplitStep&&) noexcept = default;

// Matches and what lies between them, in order. A match may be empty (a look-ahead): it still ends
// the part before it. No empty match directly after another match.
std::vector<SplitStep::Part> SplitStep::parts(std::string_view text) const {
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(impl_->code, nullptr), pcre2_match_data_free);
  std::vector<Part> found_parts;
  std::size_t done = 0, at = 0;
  bool any = false;
  while (at <= text.size()) {
    const int found =
        pcre2_match(impl_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                    at ? PCRE2_NO_UTF_CHECK : 0, match.get(), impl_->context);
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) {
      PCRE2_UCHAR message[256];
      pcre2_get_error_message(found, message, sizeof message);
      throw Error(ErrorCode::kInvalidArgument,
                  str(impl_->file, ": pre_tokenizer pattern: failed on this text of ", text.size(),
                      " bytes: ", reinterpret_cast<const char*>(message)));
    }
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(match.get());
    // \K in a look-around can make a match end before it starts.
    const std::size_t begin = std::max<std::size_t>(span[0], done), end = span[1];
    if (end <= begin) {
      if (end == begin && !(any && begin == done)) {
        if (begin > done) found_parts.push_back({done, begin, invert_});
        found_parts.push_back({begin, begin, !invert_});
        done = begin;
        any = true;
      }
      at = begin + 1;
      while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) ++at;
      continue;
    }
    if (begin > done) found_parts.push_back({done, begin, invert_});
    found_parts.push_back({begin, end, !invert_});
    done = at = end;
    any = true;
  }
  if (done < text.size()) found_parts.push_back({done, text.size(), invert_});
  return found_parts;
}

void SplitStep::split(std::string_view text, std::vector<std::string_view>& pieces) const {
  if (text.empty()) return;
  std::vector<Part> list = parts(text), merged;
  if (behavior_ == SplitBehavior::kMergedWithNext) std::reverse(list.begin(), list.end());
  bool previous = false;  // whether the part before (after, for kMergedWithNext) was a match
  for (const Part& part : list) {
    const bool glue = behavior_ == SplitBehavior::kContiguous ? part.match == previous
                      : behavior_ == SplitBehavior::kMergedWithPrevious ||
                              behavior_ == SplitBehavior::kMergedWithNext
                          ? part.match && !previous
                          : false;
    previous = part.match;
    if (glue && !merged.empty()) {
      merged.back().begin = std::min(merged.back().begin, part.begin);
      merged.back().end = std::max(merged.back().end, part.end);
    } else if (behavior_ != SplitBehavior::kRemoved || !part.match) {
      merged.push_back(part);
    }
  }
  if (behavior_ == SplitBehavior::kMergedWithNext) std::reverse(merged.begin(), merged.end());
  for (const Part& part : merged) {
    if (part.end > part.begin) pieces.push_back(text.substr(part.begin, part.end - part.begin));
  }
}

std::vector<SplitStep> build_pre_tokenizer(const JsonObject& tokenizer, const std::string& file) {
  std::vector<SplitStep> steps;
  if (tokenizer.has("pre_tokenizer")) add_step(tokenizer.object("pre_tokenizer"), file, steps, 0);
  return steps;
}

}  // namespace snapmla::model
