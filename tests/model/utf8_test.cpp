// UTF-8: every code point, every pair of bytes, and what replaces invalid parts.
#include "model/utf8.h"

#include <gtest/gtest.h>

namespace snapmla::model {
namespace {

TEST(Utf8, EveryCodePointIsOneCharacter) {
  for (std::uint32_t c = 0; c <= 0x10ffff; ++c) {
    if (c >= 0xd800 && c <= 0xdfff) continue;
    std::string s;
    append_utf8(c, s);
    ASSERT_EQ(s.size(), c < 0x80 ? 1u : c < 0x800 ? 2u : c < 0x10000 ? 3u : 4u) << c;
    ASSERT_EQ(utf8_length(s + "x"), static_cast<int>(s.size())) << c;
    for (std::size_t n = 1; n < s.size(); ++n) ASSERT_EQ(utf8_length(s.substr(0, n)), -1) << c;
    if (c % 97 == 0) {
      ASSERT_EQ(to_valid_utf8(s), s);
    }
  }
}

TEST(Utf8, SurrogatesOverlongFormsAndLargeValuesAreInvalid) {
  for (const char* s : {"\xed\xa0\x80", "\xed\xbf\xbf", "\xc0\x80", "\xc1\xbf", "\xe0\x80\x80",
                        "\xe0\x9f\xbf", "\xf0\x80\x80\x80", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80",
                        "\xf5\x80\x80\x80", "\xff", "\xfe", "\x80", "\xbf"}) {
    EXPECT_EQ(utf8_length(s), 0) << testing::PrintToString(std::string(s));
  }
}

class Utf8FirstByte : public testing::TestWithParam<int> {};

// All pairs of bytes: the second decides whether the first can still become a character.
TEST_P(Utf8FirstByte, PairsAreJudgedAsTheStandardDoes) {
  const int first = GetParam();
  for (int second = 0; second < 256; ++second) {
    const std::string s = {static_cast<char>(first), static_cast<char>(second)};
    const bool continues = second >= 0x80 && second <= 0xbf;
    int want = 0;
    if (first < 0x80) want = 1;
    if (first >= 0xc2 && first <= 0xdf && continues) want = 2;
    if (first >= 0xe0 && first <= 0xef && continues && !(first == 0xe0 && second < 0xa0) &&
        !(first == 0xed && second > 0x9f))
      want = -1;
    if (first >= 0xf0 && first <= 0xf4 && continues && !(first == 0xf0 && second < 0x90) &&
        !(first == 0xf4 && second > 0x8f))
      want = -1;
    EXPECT_EQ(utf8_length(s), want) << first << " " << second;
    const std::string valid = to_valid_utf8(s);
    for (std::string_view rest = valid; !rest.empty();) {
      const int length = utf8_length(rest);
      ASSERT_GT(length, 0) << first << " " << second;
      rest.remove_prefix(static_cast<std::size_t>(length));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Bytes, Utf8FirstByte, testing::Range(0, 256));

// One U+FFFD for each maximal part that could have begun a character (Unicode 15, 3.9, table 3-8).
TEST(Utf8, ReplacesMaximalInvalidParts) {
  const std::string r = "\xef\xbf\xbd";
  EXPECT_EQ(to_valid_utf8(""), "");
  EXPECT_EQ(to_valid_utf8("a\x80z"), "a" + r + "z");
  EXPECT_EQ(to_valid_utf8("\xf0\x9f\x98"), r);         // cut off at the end
  EXPECT_EQ(to_valid_utf8("\xf0\x9f\x98z"), r + "z");  // three bytes of four, one replacement
  EXPECT_EQ(to_valid_utf8("\xe2\x82\xe2\x82\xac"), r + "\xe2\x82\xac");
  EXPECT_EQ(to_valid_utf8("\xc0\xaf"), r + r);
  EXPECT_EQ(to_valid_utf8("\xed\xa0\x80"), r + r + r);
  EXPECT_EQ(to_valid_utf8("\x61\xf1\x80\x80\xe1\x80\xc2\x62\x80\x63\x80\xbf\x64"),
            "a" + r + r + r + "b" + r + "c" + r + r + "d");
  EXPECT_EQ(to_valid_utf8(std::string("a\0b", 3)), std::string("a\0b", 3));
}

}  // namespace
}  // namespace snapmla::model
