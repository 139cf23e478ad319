#include "quality/journal.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "base/check.h"
#include "quality/items.h"

namespace snapmla::quality {
namespace {

std::string first_difference(const Journal::Json& then, const Journal::Json& now) {
  for (const auto& [key, value] : now.items()) {
    const auto before = then.find(key);
    const std::string was = before == then.end() ? "nothing" : before->dump();
    if (was != value.dump()) return str(key, " ", was, ", now ", value.dump());
  }
  for (const auto& [key, value] : then.items()) {
    if (!now.contains(key)) return str(key, " ", value.dump(), ", now nothing");
  }
  return "";
}

}  // namespace

Journal::Journal(const std::string& path, const Json& settings)
    : path_(path), file_(nullptr, &std::fclose) {
  std::string text;
  if (std::filesystem::exists(path)) text = read_bytes(path);
  std::size_t kept = 0;
  bool begun = false;
  for (std::size_t at = 0, end; (end = text.find('\n', at)) != std::string::npos; at = end + 1) {
    const Json line = Json::parse(text.substr(at, end - at), nullptr, false);
    const bool fits = line.is_object() && line.contains(begun ? "unit" : "settings");
    if (!fits) {
      throw Error(ErrorCode::kInvalidFile,
                  path +
                      ": not the state of an evaluation; accepted is an output directory of its "
                      "own");
    }
    if (begun) {
      units_[line["unit"].get<std::string>()] = line["result"];
    } else {
      const std::string differs = first_difference(line["settings"], settings);
      if (!differs.empty()) {
        throw Error(ErrorCode::kInvalidArgument,
                    path + " was begun with other settings: " + differs +
                        "; accepted are the same settings, or another output directory");
      }
      begun = true;
    }
    kept = end + 1;
  }
  if (!begun && kept == 0 && !text.empty() && text.rfind("{\"settings\"", 0) != 0) {
    throw Error(
        ErrorCode::kInvalidFile,
        path + ": not the state of an evaluation; accepted is an output directory of its own");
  }
  std::error_code code;
  if (kept < text.size()) std::filesystem::resize_file(path, kept, code);
  file_.reset(code ? nullptr : std::fopen(path.c_str(), "ab"));
  if (!file_) {
    throw Error(ErrorCode::kIo, path + ": cannot be written: " +
                                    (code ? code.message() : std::string(std::strerror(errno))));
  }
  if (!begun) write({{"settings", settings}});
}

void Journal::write(const Json& line) {
  const std::string text = line.dump() + "\n";
  if (std::fwrite(text.data(), 1, text.size(), file_.get()) != text.size() ||
      std::fflush(file_.get()) != 0 || fsync(fileno(file_.get())) != 0) {
    throw Error(ErrorCode::kIo, path_ + ": cannot be written: " + std::strerror(errno));
  }
}

void Journal::add(const std::string& unit, const Json& result) {
  write({{"unit", unit}, {"result", result}});
  units_[unit] = result;
}

}  // namespace snapmla::quality
