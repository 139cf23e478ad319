#include "model/safetensors.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>

#include "base/check.h"
#include "model/json.h"

namespace snapmla::model {
namespace {

constexpr std::int64_t kMaxHeader = 100'000'000;  // the reference implementation's limit
constexpr std::int64_t kMaxIndex = 64 << 20;

std::optional<DType> dtype_of(const std::string& name) {
  static const std::map<std::string, DType> known = {
      {"F64", DType::kF64},   {"F32", DType::kF32},      {"F16", DType::kF16},
      {"BF16", DType::kBF16}, {"F8_E4M3", DType::kE4M3}, {"I64", DType::kI64},
      {"I32", DType::kI32},   {"U8", DType::kU8},        {"BOOL", DType::kBool}};
  const auto it = known.find(name);
  return it == known.end() ? std::nullopt : std::optional(it->second);
}

std::int64_t unsigned_integer(const nlohmann::json& value, const std::string& where) {
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > INT64_MAX) {
    throw Error(ErrorCode::kInvalidFile, str(where, ": accepted are integers from 0 to 2^63 - 1"));
  }
  return value.get<std::int64_t>();
}

TensorView make_view(const std::uint8_t* data, DType dtype,
                     const std::vector<std::int64_t>& shape) {
  switch (shape.size()) {
    case 0:
      return TensorView(data, dtype, {1});  // a scalar
    case 1:
      return TensorView(data, dtype, {shape[0]});
    case 2:
      return TensorView(data, dtype, {shape[0], shape[1]});
    case 3:
      return TensorView(data, dtype, {shape[0], shape[1], shape[2]});
    case 4:
      return TensorView(data, dtype, {shape[0], shape[1], shape[2], shape[3]});
    default:
      return TensorView(data, dtype, {shape[0], shape[1], shape[2], shape[3], shape[4]});
  }
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : file_(path) {
  try {
    parse();
  } catch (const Error&) {
    file_.check();  // if the file changed under the parser, that is the error to report
    throw;
  }
  file_.check();
}

void SafetensorsFile::parse() {
  const std::string& name = file_.name();
  const std::uint8_t* data = file_.data();
  const std::int64_t size = file_.size();
  if (size < 8) {
    throw Error(
        ErrorCode::kInvalidFile,
        str(name, ": got ", size, " bytes, accepted is at least the 8 of the header length"));
  }
  std::uint64_t length = 0;
  std::memcpy(&length, data, 8);  // little-endian, as the format says and this code assumes
  if (length > static_cast<std::uint64_t>(std::min(kMaxHeader, size - 8))) {
    throw Error(ErrorCode::kInvalidFile,
                str(name, ": header length: got ", length, ", accepted are at most ",
                    std::min(kMaxHeader, size - 8), " bytes in this file"));
  }
  if (length == 0 || data[8] != '{') {
    throw Error(ErrorCode::kInvalidFile,
                name + ": header: accepted is a JSON object that starts with '{'");
  }
  const auto header_end = static_cast<std::int64_t>(8 + length);
  const std::int64_t data_bytes = size - header_end;
  const nlohmann::json header = parse_json({reinterpret_cast<const char*>(data) + 8, length}, name);
  std::vector<std::pair<std::int64_t, std::int64_t>> spans;
  for (const auto& [tensor, value] : header.items()) {
    if (tensor == "__metadata__") continue;
    const std::string where = name + ": tensor '" + tensor.substr(0, 200) + "'";
    const JsonObject entry(value, name, tensor.substr(0, 200));
    const std::optional<DType> dtype = dtype_of(entry.string("dtype"));
    if (!dtype) entry.refuse("dtype", "one of F64, F32, F16, BF16, F8_E4M3, I64, I32, U8, BOOL");
    const nlohmann::json &shape_json = entry.raw("shape"), &offsets = entry.raw("data_offsets");
    if (!shape_json.is_array() || shape_json.size() > TensorView::kMaxRank) {
      entry.refuse("shape", "a list of at most 5 extents");
    }
    if (!offsets.is_array() || offsets.size() != 2) entry.refuse("data_offsets", "[begin, end]");
    std::vector<std::int64_t> shape;
    auto bytes = static_cast<std::int64_t>(size_of(*dtype));
    for (const nlohmann::json& extent : shape_json) {
      shape.push_back(unsigned_integer(extent, where + ": shape"));
      if (__builtin_mul_overflow(bytes, shape.back(), &bytes)) {
        throw Error(ErrorCode::kInvalidFile,
                    where + ": shape: the number of bytes exceeds 64 bits");
      }
    }
    const std::int64_t begin = unsigned_integer(offsets[0], where + ": data_offsets");
    const std::int64_t end = unsigned_integer(offsets[1], where + ": data_offsets");
    if (begin > end || end > data_bytes || end - begin != bytes) {
      throw Error(ErrorCode::kInvalidFile,
                  str(where, ": data_offsets: got [", begin, ", ", end, "), accepted is a span of ",
                      bytes, " bytes inside the ", data_bytes, " bytes of data"));
    }
    spans.emplace_back(begin, end);
    tensors_.emplace(tensor, make_view(data + header_end + begin, *dtype, shape));
  }
  std::sort(spans.begin(), spans.end());
  std::int64_t at = 0;
  for (const auto& [begin, end] : spans) {
    if (begin != at) {
      throw Error(ErrorCode::kInvalidFile,
                  str(name, ": data section: a gap or an overlap at byte ", std::min(begin, at)));
    }
    at = end;
  }
  if (at != data_bytes) {
    throw Error(ErrorCode::kInvalidFile,
                str(name, ": data section: got ", data_bytes, " bytes, the tensors describe ", at));
  }
}

void Checkpoint::add(const std::filesystem::path& path) {
  files_.push_back(std::make_unique<SafetensorsFile>(path));
  for (const auto& [name, view] : files_.back()->tensors()) {
    if (!tensors_.emplace(name, view).second) {
      throw Error(ErrorCode::kInvalidFile,
                  str(path.string(), ": tensor '", name, "' is in another shard too"));
    }
  }
  total_bytes_ += files_.back()->size();
}

Checkpoint Checkpoint::open(const std::filesystem::path& model_dir) {
  Checkpoint checkpoint;
  checkpoint.directory_ = model_dir.string();
  const std::filesystem::path single = model_dir / "model.safetensors";
  const std::filesystem::path index = model_dir / "model.safetensors.index.json";
  if (!std::filesystem::exists(index)) {
    checkpoint.add(single);
    return checkpoint;
  }
  const nlohmann::json value = parse_json(read_text(index, kMaxIndex), index.string());
  const JsonObject json(value, index.string());
  const nlohmann::json map = json.raw("weight_map");
  if (!map.is_object()) json.refuse("weight_map", "an object of tensor names and shard files");
  std::set<std::string> shards;
  std::map<std::string, std::string> shard_of;
  for (const auto& [tensor, shard] : map.items()) {
    // A shard is a file of the directory itself: no path, no way out of it.
    const std::string file = shard.is_string() ? shard.get<std::string>() : "";
    if (file.empty() || file.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos ||
        file[0] == '.') {
      throw Error(ErrorCode::kInvalidFile,
                  str(index.string(), ": weight_map['", tensor.substr(0, 200), "']: got '",
                      file.substr(0, 100), "', accepted is a file name without a path"));
    }
    shards.insert(file);
    shard_of.emplace(tensor, file);
  }
  for (const std::string& shard : shards) checkpoint.add(model_dir / shard);
  std::size_t listed = 0;
  std::size_t at = 0;
  for (const std::string& shard : shards) {
    for (const auto& entry : checkpoint.files_[at++]->tensors()) {
      const auto it = shard_of.find(entry.first);
      if (it == shard_of.end() || it->second != shard) {
        throw Error(ErrorCode::kInvalidFile,
                    str(index.string(), ": weight_map: tensor '", entry.first, "' of ", shard,
                        " is not listed as a tensor of that file"));
      }
      ++listed;
    }
  }
  if (listed == shard_of.size()) return checkpoint;
  for (const auto& [tensor, shard] : shard_of) {
    if (!checkpoint.has(tensor)) {
      throw Error(ErrorCode::kInvalidFile,
                  str(index.string(), ": weight_map: tensor '", tensor, "' is not in ", shard));
    }
  }
  return checkpoint;
}

void Checkpoint::check_files() const {
  for (const auto& file : files_) file->file().check();
}

void Checkpoint::check_reads() const {
  for (const auto& file : files_) {
    if (file->file().damaged()) file->file().check();
  }
}

TensorView Checkpoint::get(const std::string& name) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end())
    throw Error(ErrorCode::kNotFound, directory_ + ": no tensor '" + name + "'");
  return it->second;
}

}  // namespace snapmla::model
