#include "model/utf8.h"

namespace snapmla::model {

void append_utf8(std::uint32_t c, std::string& out) {
  const auto put = [&out](std::uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xc0 | (c >> 6));
    put(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    put(0xe0 | (c >> 12));
    put(0x80 | ((c >> 6) & 0x3f));
    put(0x80 | (c & 0x3f));
  } else {
    put(0xf0 | (c >> 18));
    put(0x80 | ((c >> 12) & 0x3f));
    put(0x80 | ((c >> 6) & 0x3f));
    put(0x80 | (c & 0x3f));
  }
}

int utf8_length(std::string_view s) {
  const auto byte = [&s](std::size_t i) { return static_cast<unsigned char>(s[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  const int length = first >= 0xc2 && first < 0xe0   ? 2
                     : first >= 0xe0 && first < 0xf0 ? 3
                     : first >= 0xf0 && first < 0xf5 ? 4
                                                     : 0;
  if (length == 0) return 0;
  for (int i = 1; i < length; ++i) {
    if (static_cast<std::size_t>(i) >= s.size()) return -1;
    unsigned char low = 0x80, high = 0xbf;
    if (i == 1) {  // overlong forms, surrogates, beyond U+10FFFF
      if (first == 0xe0) low = 0xa0;
      if (first == 0xed) high = 0x9f;
      if (first == 0xf0) low = 0x90;
      if (first == 0xf4) high = 0x8f;
    }
    if (byte(static_cast<std::size_t>(i)) < low || byte(static_cast<std::size_t>(i)) > high)
      return 0;
  }
  return length;
}

std::string to_valid_utf8(std::string_view s) {
  std::string out;
  while (!s.empty()) {
    const int length = utf8_length(s);
    if (length > 0) {
      out.append(s.substr(0, static_cast<std::size_t>(length)));
      s.remove_prefix(static_cast<std::size_t>(length));
      continue;
    }
    out += "\xef\xbf\xbd";
    if (length < 0) break;  // a character cut off at the end
    // Drop the first byte and those that would have continued it.
    std::size_t bad = 1;
    while (bad < s.size() && utf8_length(s.substr(0, bad)) == -1 &&
           utf8_length(s.substr(0, bad + 1)) == -1)
      ++bad;
    s.remove_prefix(bad);
  }
  return out;
}

}  // namespace snapmla::model
