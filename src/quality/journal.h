// The state of an evaluation on disk: JSON lines, the settings first, then one line per finished
// unit of work. A run that was interrupted goes on from it.
#pragma once

#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

namespace snapmla::quality {

class Journal {
 public:
  using Json = nlohmann::ordered_json;

  // Opens or begins the file. A line that was cut off at its end, by a kill, is dropped. Throws
  // kInvalidArgument when the file was begun with other settings, naming the first that differs,
  // kInvalidFile when it is not such a file, kIo.
  Journal(const std::string& path, const Json& settings);

  bool has(const std::string& unit) const { return units_.count(unit) > 0; }
  // Written to the disk when it returns. Throws kIo.
  void add(const std::string& unit, const Json& result);
  const std::map<std::string, Json>& units() const { return units_; }

 private:
  void write(const Json& line);

  std::string path_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
  std::map<std::string, Json> units_;
};

}  // namespace snapmla::quality
