// safetensors files, memory-mapped: one file or shards with an index. Nothing in a file is trusted:
// every length, offset and product is checked before it is used, and the tensors must tile the data
// section exactly.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "snapmla/tensor.h"

namespace snapmla::model {

// One file. Throws Error naming the file, and the tensor where there is one.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  std::int64_t size() const { return size_; }
  // Throws kIo when the file has another size than at open. Reading a mapped page beyond the new
  // end would raise SIGBUS; a file must not change while it is loaded, and this names the one that
  // did.
  void check_size() const;

 private:
  void map(const std::filesystem::path& path);
  void parse();

  std::string name_;
  int fd_ = -1;
  const std::uint8_t* data_ = nullptr;
  std::int64_t size_ = 0;
  std::map<std::string, TensorView> tensors_;
};

// All weights of a directory: model.safetensors, or model.safetensors.index.json with its shards.
class Checkpoint {
 public:
  static Checkpoint open(const std::filesystem::path& model_dir);

  bool has(const std::string& name) const { return tensors_.contains(name); }
  // Throws kNotFound naming the tensor and the directory.
  TensorView get(const std::string& name) const;
  void check_sizes() const;  // of every file, as SafetensorsFile::check_size
  std::int64_t total_bytes() const { return total_bytes_; }
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  const std::string& directory() const { return directory_; }

 private:
  void add(const std::filesystem::path& path);

  std::string directory_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, TensorView> tensors_;
  std::int64_t total_bytes_ = 0;
};

}  // namespace snapmla::model
