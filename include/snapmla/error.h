// One error type for the whole library. Expected outcomes (out of pages, end of sequence) are
// values; everything a caller must not ignore is thrown as snapmla::Error. The library never exits
// or prints.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace snapmla {

enum class ErrorCode {
  kInvalidArgument,  // a call's argument: wrong shape, type, range, alignment, aliasing
  kInvalidFile,      // a malformed checkpoint, tokenizer or config file
  kNotFound,         // a file, tensor or name that does not exist
  kUnsupported,      // well-formed, but not something this build or device can do
  kOutOfMemory,      // host or device memory, or a cache pool too small for one request
  kIo,               // the operating system refused or failed
  kInternal,         // a broken invariant: a bug in this library
};

// Stable lower-case name of a code, for example "invalid_argument".
const char* to_string(ErrorCode code) noexcept;

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, std::string message)
      : std::runtime_error(std::move(message)), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace snapmla
