// safetensors files, memory-mapped: one file or shards with an index. Nothing in a file is trusted:
// every length, offset and product is checked before it is used, and the tensors must tile the data
// section exactly. Links are followed, as the Hugging Face cache needs (docs/design/0002).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/mapped_file.h"
#include "snapmla/tensor.h"

namespace snapmla::model {

// One file. Throws Error naming the file, and the tensor where there is one.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  std::int64_t size() const { return file_.size(); }
  const MappedFile& file() const { return file_; }

 private:
  void parse();

  MappedFile file_;
  std::map<std::string, TensorView> tensors_;
};

// All weights of a directory: model.safetensors, or model.safetensors.index.json with its shards.
class Checkpoint {
 public:
  static Checkpoint open(const std::filesystem::path& model_dir);

  bool has(const std::string& name) const { return tensors_.contains(name); }
  // Throws kNotFound naming the tensor and the directory.
  TensorView get(const std::string& name) const;
  // Throws kIo, naming the file, when one changed while it was in use: check_files() asks the
  // operating system for every size, check_reads() only whether a read has met a lost page, which
  // is cheap enough to follow every step of a computation on the weights.
  void check_files() const;
  void check_reads() const;
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
