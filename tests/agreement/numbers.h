// The number formats, written for the tests alone: by table and in double, nothing of numeric/.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "snapmla/kv_cache.h"

namespace snapmla::agreement {

inline double e4m3_value(std::uint8_t c) {
  const int e = (c >> 3) & 15, m = c & 7;
  const double v = e == 0 ? std::ldexp(m, -9) : std::ldexp(8 + m, e - 10);
  return (c & 0x7f) == 0x7f ? std::nan("") : (c & 0x80) != 0 ? -v : v;
}

// The nearest code, ties to the even one, saturating; NaN is 0x7f.
inline std::uint8_t e4m3_code(double x) {
  if (std::isnan(x)) return 0x7f;
  static const std::array<double, 127> values = [] {
    std::array<double, 127> table{};
    for (std::size_t c = 0; c < table.size(); ++c)
      table[c] = e4m3_value(static_cast<std::uint8_t>(c));
    return table;
  }();
  const double size = std::min(std::fabs(x), 448.0);
  const auto above = std::lower_bound(values.begin(), values.end(), size);
  auto code = static_cast<std::size_t>(above - values.begin());
  if (code > 0) {
    const double up = values[code] - size, down = size - values[code - 1];
    if (down < up || (down == up && code % 2 == 1)) --code;
  }
  return static_cast<std::uint8_t>(code | (std::signbit(x) ? 0x80u : 0u));
}

inline double bf16_value(std::uint16_t bits) {
  const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
  float v;
  std::memcpy(&v, &word, 4);
  return v;
}

// Finite x rounded to eight bits of mantissa, nearest even.
inline std::uint16_t bf16_bits(double x) {
  int exponent = 0;
  std::frexp(x, &exponent);
  const int unit = std::max(exponent - 8, -133);
  const auto rounded = static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit));
  std::uint32_t word;
  std::memcpy(&word, &rounded, 4);
  return static_cast<std::uint16_t>(word >> 16);
}

// Where byte `byte` of token `token` lies in a plane of `row_bytes` per token.
inline std::int64_t place(PageImage image, std::int64_t row_bytes, std::int64_t token,
                          std::int64_t byte) {
  if (image == PageImage::kPlainRows) return token * row_bytes + byte;
  const std::int64_t unit = byte % 128 / 16;
  return byte / 128 * 8192 + token * 128 + (unit ^ (token % 8)) * 16 + byte % 16;
}

// Element d of a token in a plane whose elements have 1 (e4m3), 2 (bf16) or 4 (f32) bytes.
inline double stored(const std::uint8_t* plane, PageImage image, std::int64_t width,
                     std::int64_t bytes, std::int64_t token, std::int64_t d) {
  const std::uint8_t* at = plane + place(image, width * bytes, token, d * bytes);
  if (bytes == 1) return e4m3_value(*at);
  std::uint32_t word = 0;
  std::memcpy(reinterpret_cast<std::uint8_t*>(&word) + (4 - bytes), at,
              static_cast<std::size_t>(bytes));
  float v;
  std::memcpy(&v, &word, 4);
  return v;
}

}  // namespace snapmla::agreement
