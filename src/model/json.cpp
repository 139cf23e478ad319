#include "model/json.h"

#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <set>
#include <vector>

#include "base/check.h"

namespace snapmla::model {
namespace {

using nlohmann::json;

// The library's message without its own name for the error, "[json.exception.parse_error.101] ".
std::string reason(const nlohmann::detail::exception& e) {
  const std::string_view what = e.what();
  const std::size_t end = what.starts_with("[json.exception.") ? what.find("] ") : what.npos;
  return std::string(end == what.npos ? what : what.substr(end + 2));
}

// Sees the events before any value is built, so hostile nesting costs no memory and no stack.
class Guard : public json::json_sax_t {
 public:
  explicit Guard(const std::string& file) : file_(file) {}
  bool null() override { return value(); }
  bool boolean(bool) override { return value(); }
  bool number_integer(number_integer_t) override { return value(); }
  bool number_unsigned(number_unsigned_t) override { return value(); }
  bool number_float(number_float_t, const string_t&) override { return value(); }
  bool string(string_t&) override { return value(); }
  bool binary(binary_t&) override { return value(); }
  bool start_object(std::size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool start_array(std::size_t) override { return open(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (!keys_.back().insert(name).second) {
      throw Error(ErrorCode::kInvalidFile,
                  str(file_, ": key '", name.substr(0, 100), "' appears twice in one object"));
    }
    return true;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& e) override {
    throw Error(ErrorCode::kInvalidFile,
                str(file_, ": not valid JSON at byte ", position, ": ", reason(e)));
  }

 private:
  bool value() {
    if (++values_ > kMaxJsonValues) {
      throw Error(ErrorCode::kInvalidFile, str(file_, ": more than ", kMaxJsonValues, " values"));
    }
    return true;
  }
  bool open() {
    value();
    keys_.emplace_back();
    if (keys_.size() > kMaxJsonDepth) {
      throw Error(ErrorCode::kInvalidFile,
                  str(file_, ": nested deeper than ", kMaxJsonDepth, " levels"));
    }
    return true;
  }
  bool close() {
    keys_.pop_back();
    return true;
  }

  const std::string& file_;
  std::vector<std::set<std::string>> keys_;
  std::size_t values_ = 0;
};

std::string shown(const json& value) {
  const std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  return text.size() <= 60 ? text : text.substr(0, 57) + "...";
}

}  // namespace

json parse_json(std::string_view text, const std::string& file) {
  Guard guard(file);
  json::sax_parse(text, &guard);
  try {
    return json::parse(text);
  } catch (const json::exception& e) {
    throw Error(ErrorCode::kInvalidFile, str(file, ": not valid JSON: ", reason(e)));
  }
}

std::string read_text(const std::filesystem::path& path, std::int64_t max_bytes) {
  using std::filesystem::file_type;
  std::error_code code;
  const file_type type = std::filesystem::status(path, code).type();
  if (type == file_type::not_found) {
    throw Error(ErrorCode::kNotFound, path.string() + ": no such file");
  }
  if (code) throw Error(ErrorCode::kIo, path.string() + ": " + code.message());
  if (type != file_type::regular) {  // opening a FIFO would wait for a writer
    throw Error(ErrorCode::kInvalidFile,
                str(path.string(), ": got ",
                    type == file_type::directory ? "a directory"
                                                 : "something that is neither file nor directory",
                    ", accepted is a regular file"));
  }
  const auto size = std::filesystem::file_size(path, code);
  if (code) throw Error(ErrorCode::kIo, path.string() + ": " + code.message());
  if (size > static_cast<std::uintmax_t>(max_bytes)) {
    throw Error(ErrorCode::kInvalidFile,
                str(path.string(), ": got ", size, " bytes, accepted are at most ", max_bytes));
  }
  std::string text(size, '\0');
  errno = 0;
  std::ifstream in(path, std::ios::binary);
  if (!in) throw Error(ErrorCode::kIo, str(path.string(), ": ", std::strerror(errno)));
  if (!in.read(text.data(), static_cast<std::streamsize>(size))) {
    throw Error(ErrorCode::kIo, path.string() + ": cannot be read");
  }
  return text;
}

JsonObject::JsonObject(const json& value, std::string file, std::string path)
    : value_(&value), file_(std::move(file)), path_(std::move(path)) {
  if (!value.is_object()) {
    throw Error(ErrorCode::kInvalidFile,
                str(file_, ": ", path_.empty() ? "top level" : path_, ": got ", value.type_name(),
                    ", accepted is an object"));
  }
}

bool JsonObject::has(const std::string& key) const {
  return value_->contains(key) && !(*value_)[key].is_null();
}

const json& JsonObject::raw(const std::string& key) const {
  if (!has(key)) refuse(key, "a value");
  return (*value_)[key];
}

void JsonObject::refuse(const std::string& key, const std::string& accepted) const {
  const std::string got = value_->contains(key) ? shown((*value_)[key]) : "nothing";
  throw Error(ErrorCode::kInvalidFile, str(file_, ": ", path_.empty() ? "" : path_ + ".", key,
                                           ": got ", got, ", accepted is ", accepted));
}

std::int64_t JsonObject::integer(const std::string& key, std::int64_t low,
                                 std::int64_t high) const {
  const double value = number(key, static_cast<double>(low), static_cast<double>(high));
  if (value != std::floor(value)) refuse(key, str("an integer from ", low, " to ", high));
  return static_cast<std::int64_t>(value);
}

std::int64_t JsonObject::integer_or(const std::string& key, std::int64_t low, std::int64_t high,
                                    std::int64_t missing) const {
  return has(key) ? integer(key, low, high) : missing;
}

double JsonObject::number(const std::string& key, double low, double high) const {
  const std::string accepted = str("a number from ", low, " to ", high);
  if (!has(key) || !(*value_)[key].is_number()) refuse(key, accepted);
  const double value = (*value_)[key].get<double>();
  if (!(value >= low && value <= high)) refuse(key, accepted);
  return value;
}

double JsonObject::number_or(const std::string& key, double low, double high,
                             double missing) const {
  return has(key) ? number(key, low, high) : missing;
}

bool JsonObject::boolean_or(const std::string& key, bool missing) const {
  if (!has(key)) return missing;
  if (!(*value_)[key].is_boolean()) refuse(key, "true or false");
  return (*value_)[key].get<bool>();
}

std::string JsonObject::string(const std::string& key) const {
  if (!has(key) || !(*value_)[key].is_string()) refuse(key, "a string");
  return (*value_)[key].get<std::string>();
}

std::string JsonObject::string_or(const std::string& key, const std::string& missing) const {
  return has(key) ? string(key) : missing;
}

JsonObject JsonObject::object(const std::string& key) const {
  if (!has(key) || !(*value_)[key].is_object()) refuse(key, "an object");
  return JsonObject((*value_)[key], file_, path_.empty() ? key : path_ + "." + key);
}

}  // namespace snapmla::model
