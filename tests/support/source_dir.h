// Where the repository's data lie: where it was built, or, for a suite that was carried to another
// machine, the directory it runs in.
#pragma once

#include <filesystem>

namespace snapmla {

inline std::filesystem::path source_dir() {
  const std::filesystem::path built = SNAPMLA_SOURCE_DIR;
  return std::filesystem::exists(built / "models") ? built : std::filesystem::current_path();
}

}  // namespace snapmla
