// Files of small checkpoints, written byte by byte so that tests can make them wrong.
#pragma once

#include <gtest/gtest.h>

#include <unistd.h>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

namespace snapmla::testing_files {

// A new empty directory under the test's temporary directory.
inline std::filesystem::path fresh_directory() {
  static std::atomic<int> next{0};
  const std::filesystem::path dir =
      std::filesystem::path(::testing::TempDir()) /
      ("snapmla_model_" + std::to_string(getpid()) + "_" + std::to_string(next++));
  std::filesystem::remove_all(dir);
  std::filesystem::create_directories(dir);
  return std::filesystem::canonical(dir);
}

inline void write_text(const std::filesystem::path& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
  ASSERT_TRUE(out.good()) << path;
}

// A safetensors file: the length of `header`, then it, then `data`.
inline std::string raw_file(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + data;
}

}  // namespace snapmla::testing_files
