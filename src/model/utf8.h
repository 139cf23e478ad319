// Small UTF-8 helpers.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace snapmla::model {

void append_utf8(std::uint32_t code_point, std::string& out);

// Length in bytes of the valid character at the start of s; 0 when it is invalid; -1 when s ends
// inside a character that could still become valid.
int utf8_length(std::string_view s);

// Every maximal invalid part replaced by U+FFFD.
std::string to_valid_utf8(std::string_view s);

}  // namespace snapmla::model
