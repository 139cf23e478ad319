// Reading JSON that a stranger wrote: bounded size and depth, no duplicate keys, and typed access
// whose errors name the file and the field.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace snapmla::model {

inline constexpr int kMaxJsonDepth = 64;
// Far above any checkpoint's files (a tokenizer of 200,000 tokens has a million values); a value in
// memory is ten times as large as its shortest spelling, so the file's size alone bounds little.
inline constexpr std::size_t kMaxJsonValues = 4'000'000;

// Throws kInvalidFile: not JSON, nested deeper than 64, a key twice in one object.
nlohmann::json parse_json(std::string_view text, const std::string& file);

// Whole file as text. Throws kNotFound or kIo, kInvalidFile when it is no regular file or larger
// than max_bytes.
std::string read_text(const std::filesystem::path& path, std::int64_t max_bytes);

// An object with the file's name for messages.
class JsonObject {
 public:
  JsonObject(const nlohmann::json& value, std::string file, std::string path = "");

  bool has(const std::string& key) const;  // present and not null
  const nlohmann::json& raw(const std::string& key) const;

  // Integer in [low, high]; numbers like 8.0 count as integers.
  std::int64_t integer(const std::string& key, std::int64_t low, std::int64_t high) const;
  std::int64_t integer_or(const std::string& key, std::int64_t low, std::int64_t high,
                          std::int64_t missing) const;
  double number(const std::string& key, double low, double high) const;
  double number_or(const std::string& key, double low, double high, double missing) const;
  bool boolean_or(const std::string& key, bool missing) const;
  std::string string(const std::string& key) const;
  std::string string_or(const std::string& key, const std::string& missing) const;
  JsonObject object(const std::string& key) const;

  // Throws kInvalidFile "<file>: <field>: got <got>, accepted is <accepted>".
  [[noreturn]] void refuse(const std::string& key, const std::string& accepted) const;

 private:
  const nlohmann::json* value_;
  std::string file_, path_;
};

}  // namespace snapmla::model
