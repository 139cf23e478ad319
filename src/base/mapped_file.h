// A file mapped for reading, safe against the file being cut short while it is mapped.
//
// Reading a mapped page that lies beyond the end of a file which somebody truncated raises SIGBUS,
// which ends the process. Here a SIGBUS inside a MappedFile puts a page of zeros in the place of
// the lost one and marks the file as damaged; the reader goes on and learns of it from check(),
// which has to come after the reads that matter. So a computation on several threads ends with an
// ordinary error, and no read pays for it. Every other SIGBUS goes to the handler that was
// installed before ours.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace snapmla {

class MappedFile {
 public:
  // Maps a whole regular file of at least one byte; links are followed. Throws kNotFound, kIo or
  // kInvalidFile naming the file. The first call installs the process's SIGBUS handler.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::uint8_t* data() const { return data_; }
  std::int64_t size() const { return size_; }  // bytes, at open
  const std::string& name() const { return name_; }

  // Throws kIo when a read met a lost page, or when the file no longer has the size it had at open.
  void check() const;
  // Whether a read met a lost page. One load of an atomic: cheap enough for every step.
  bool damaged() const;

  struct Range;  // what the signal handler knows of one mapping

 private:
  std::string name_;
  int fd_ = -1;
  const std::uint8_t* data_ = nullptr;
  std::int64_t size_ = 0;
  Range* range_ = nullptr;
};

}  // namespace snapmla
