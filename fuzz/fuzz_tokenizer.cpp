// tokenizer.json of a stranger, and a text for it: ids of the vocabulary or an Error, nothing else.
// The input is the file, a NUL byte, and the text.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "model/tokenizer.h"
#include "model/utf8.h"
#include "snapmla/error.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const std::size_t end = std::min(all.find('\0'), size);
  const std::string_view text = end < size ? all.substr(end + 1) : "Hello, world! 123 \xe4\xb8\xad";
  try {
    const snapmla::Tokenizer tokenizer =
        snapmla::Tokenizer::parse(all.substr(0, end), "tokenizer.json");
    for (bool parse_special : {true, false}) {
      const auto ids = tokenizer.encode(text, parse_special);
      for (std::int32_t id : ids)
        if (id < 0 || id >= tokenizer.vocab_size()) std::abort();
      const std::string decoded = tokenizer.decode(ids, false);
      if (snapmla::model::to_valid_utf8(decoded) != decoded) std::abort();
      snapmla::StreamDecoder stream(tokenizer);
      std::string streamed;
      for (std::int32_t id : ids) streamed += stream.push(id);
      streamed += stream.finish();
      if (streamed != tokenizer.decode(ids)) std::abort();
    }
  } catch (const snapmla::Error&) {
  }
  return 0;
}
