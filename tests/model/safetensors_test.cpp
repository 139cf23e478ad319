// Hostile and well-formed safetensors files: every refusal names the file and what is wrong.
#include "model/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "model/checkpoint_files.h"
#include "snapmla/error.h"

namespace snapmla::model {
namespace {

namespace fs = std::filesystem;
using testing_files::fresh_directory;
using testing_files::raw_file;
using testing_files::write_text;

// Message of the Error that `call` throws; fails the test when it throws none.
template <class Call>
std::string error_of(Call call, ErrorCode code) {
  try {
    call();
  } catch (const Error& e) {
    EXPECT_EQ(to_string(e.code()), std::string(to_string(code))) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "accepted";
  return "";
}

struct BadHeader {
  const char* label;
  const char* header;
  std::size_t data_bytes;
  const char* message;
};

const BadHeader kBadHeaders[] = {
    {"Array", "[]", 0, "'{'"},
    {"LeadingSpace", " {}", 0, "'{'"},
    {"Text", "hello", 0, "'{'"},
    {"OpenObject", "{", 0, "JSON"},
    {"Trailing", "{}x", 0, "JSON"},
    {"EntryIsNumber", R"({"a":1})", 0, "a: got number"},
    {"EntryIsNull", R"({"a":null})", 0, "a: got null"},
    {"NoDtype", R"({"a":{"shape":[1],"data_offsets":[0,4]}})", 4, "a.dtype"},
    {"NoShape", R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", 4, "a.shape"},
    {"NoOffsets", R"({"a":{"dtype":"F32","shape":[1]}})", 4, "a.data_offsets"},
    {"DtypeNumber", R"({"a":{"dtype":3,"shape":[1],"data_offsets":[0,4]}})", 4, "a.dtype"},
    {"DtypeUnknown", R"({"a":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}})", 4, "got \"F7\""},
    {"DtypeLowerCase", R"({"a":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}})", 4, "a.dtype"},
    {"DtypeE5M2", R"({"a":{"dtype":"F8_E5M2","shape":[4],"data_offsets":[0,4]}})", 4, "a.dtype"},
    {"ShapeText", R"({"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}})", 4, "a.shape"},
    {"ShapeNegative", R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, "shape"},
    {"ShapeFraction", R"({"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}})", 4, "shape"},
    {"ShapeFloat", R"({"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}})", 4, "shape"},
    {"ShapeNull", R"({"a":{"dtype":"F32","shape":[null],"data_offsets":[0,4]}})", 4, "shape"},
    {"ShapeRank6", R"({"a":{"dtype":"F32","shape":[1,1,1,1,1,1],"data_offsets":[0,4]}})", 4,
     "at most 5"},
    {"ShapeAbove63Bits",
     R"({"a":{"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,4]}})", 4, "shape"},
    {"ShapeAbove64Bits",
     R"({"a":{"dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,4]}})", 4, "shape"},
    {"ShapeWrapsToZero",
     R"({"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0,
     "exceeds 64 bits"},
    {"ShapeWrapsWithDtype",
     R"({"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}})", 0,
     "exceeds 64 bits"},
    {"OffsetsReversed", R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4,
     "data_offsets"},
    {"OffsetsNegative", R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}})", 4,
     "data_offsets"},
    {"OffsetsOne", R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4, "[begin, end]"},
    {"OffsetsThree", R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}})", 4,
     "[begin, end]"},
    {"OffsetsText", R"({"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}})", 4,
     "data_offsets"},
    {"OffsetsPastEnd", R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4,
     "got [0, 8)"},
    {"OffsetsHuge",
     R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[9223372036854775806,9223372036854775807]}})",
     4, "data_offsets"},
    {"OffsetsUnsignedMax",
     R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,18446744073709551615]}})", 4,
     "data_offsets"},
    {"SpanTooSmall", R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4, "span of 8"},
    {"SpanTooLarge", R"({"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,4]}})", 4, "span of 2"},
    {"DuplicateTensor",
     R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
     R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
     2, "'a' appears twice"},
    {"DuplicateField", R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1,
     "'dtype' appears twice"},
    {"HoleAtStart", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", 2, "byte 0"},
    {"HoleInside",
     R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
     R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
     3, "byte 1"},
    {"Overlap",
     R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
     R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
     3, "byte 1"},
    {"SameSpan",
     R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
     R"("b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
     2, "byte 0"},
    {"TrailingData", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 2, "describe 1"},
    {"DataWithoutTensors", "{}", 1, "describe 0"},
};

class BadHeaders : public ::testing::TestWithParam<BadHeader> {};

TEST_P(BadHeaders, IsRefusedNamingFileAndField) {
  const fs::path dir = fresh_directory();
  const fs::path file = dir / "model.safetensors";
  const BadHeader& bad = GetParam();
  write_text(file, raw_file(bad.header, std::string(bad.data_bytes, 'x')));
  const std::string message =
      error_of([&] { SafetensorsFile opened(file); }, ErrorCode::kInvalidFile);
  EXPECT_NE(message.find(file.string()), std::string::npos) << message;
  EXPECT_NE(message.find(bad.message), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(Safetensors, BadHeaders, ::testing::ValuesIn(kBadHeaders),
                         [](const auto& info) { return std::string(info.param.label); });

class BadLengths : public ::testing::TestWithParam<std::uint64_t> {};

TEST_P(BadLengths, IsRefusedWithoutAllocating) {
  const fs::path file = fresh_directory() / "model.safetensors";
  const std::uint64_t length = GetParam();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  write_text(file, bytes + "{}");
  const std::string message =
      error_of([&] { SafetensorsFile opened(file); }, ErrorCode::kInvalidFile);
  EXPECT_NE(message.find(file.string()), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(Safetensors, BadLengths,
                         ::testing::Values(0, 1, 3, 100'000'001, std::uint64_t{1} << 31,
                                           (std::uint64_t{1} << 32) + 2, std::uint64_t{1} << 63,
                                           (std::uint64_t{1} << 63) - 8, ~std::uint64_t{0},
                                           ~std::uint64_t{0} - 7));

class ShortFiles : public ::testing::TestWithParam<int> {};

TEST_P(ShortFiles, AreRefused) {
  const fs::path file = fresh_directory() / "model.safetensors";
  write_text(file, std::string(static_cast<std::size_t>(GetParam()), '\0'));
  error_of([&] { SafetensorsFile opened(file); }, ErrorCode::kInvalidFile);
}

INSTANTIATE_TEST_SUITE_P(Safetensors, ShortFiles, ::testing::Range(0, 10));

TEST(Safetensors, HeaderAboveTheLimitIsRefusedEvenWhenTheFileHoldsIt) {
  const fs::path file = fresh_directory() / "model.safetensors";
  const std::uint64_t length = 100'000'001;
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  write_text(file, bytes + "{}");
  fs::resize_file(file, 8 + length);  // sparse
  const std::string message =
      error_of([&] { SafetensorsFile opened(file); }, ErrorCode::kInvalidFile);
  EXPECT_NE(message.find("100000000"), std::string::npos) << message;
}

TEST(Safetensors, DeepNestingIsRefused) {
  const fs::path file = fresh_directory() / "model.safetensors";
  write_text(file, raw_file("{\"a\":" + std::string(100000, '['), ""));
  const std::string message =
      error_of([&] { SafetensorsFile opened(file); }, ErrorCode::kInvalidFile);
  EXPECT_NE(message.find("deeper than 64"), std::string::npos) << message;
}

TEST(Safetensors, ReadsTypesShapesAndBytes) {
  const fs::path file = fresh_directory() / "model.safetensors";
  write_text(file, raw_file(R"({"__metadata__":{"format":"pt"},)"
                            R"("z":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[0,4]},)"
                            R"("a":{"dtype":"BF16","shape":[1,3],"data_offsets":[4,10]},)"
                            R"("e":{"dtype":"F32","shape":[0,7],"data_offsets":[10,10]},)"
                            R"("s":{"dtype":"U8","shape":[],"data_offsets":[10,11]}}    )",
                            "abcdefghijk"));
  const SafetensorsFile opened(file);
  ASSERT_EQ(opened.tensors().size(), 4u);
  const TensorView& z = opened.tensors().at("z");
  EXPECT_EQ(z.dtype(), DType::kE4M3);
  EXPECT_EQ(z.dim(0), 2);
  EXPECT_EQ(std::memcmp(z.raw(), "abcd", 4), 0);
  const TensorView& a = opened.tensors().at("a");
  EXPECT_EQ(a.dtype(), DType::kBF16);
  EXPECT_EQ(a.dim(1), 3);
  EXPECT_EQ(std::memcmp(a.raw(), "efghij", 6), 0);
  EXPECT_EQ(opened.tensors().at("e").numel(), 0);
  EXPECT_EQ(*opened.tensors().at("s").data<char>(), 'k');
}

TEST(Safetensors, ADirectoryIsNoFile) {
  error_of([] { SafetensorsFile opened(fresh_directory()); }, ErrorCode::kInvalidFile);
}

TEST(Safetensors, AFileThatShrinksIsNoticed) {
  const fs::path file = fresh_directory() / "model.safetensors";
  write_text(file, raw_file(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "abcd"));
  const Checkpoint checkpoint = Checkpoint::open(file.parent_path());
  checkpoint.check_files();
  fs::resize_file(file, fs::file_size(file) - 1);
  const std::string message = error_of([&] { checkpoint.check_files(); }, ErrorCode::kIo);
  EXPECT_NE(message.find(file.string()), std::string::npos) << message;
}

std::string one(const std::string& name) {
  return raw_file("{\"" + name + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "x");
}

TEST(Checkpoint, OpensShardsByIndex) {
  const fs::path dir = fresh_directory();
  write_text(dir / "m-1.safetensors", one("a"));
  write_text(dir / "m-2.safetensors", one("b"));
  write_text(dir / "model.safetensors.index.json",
             R"({"metadata":{},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})");
  const Checkpoint checkpoint = Checkpoint::open(dir);
  EXPECT_TRUE(checkpoint.has("a"));
  EXPECT_TRUE(checkpoint.has("b"));
  EXPECT_FALSE(checkpoint.has("c"));
  EXPECT_EQ(checkpoint.total_bytes(),
            static_cast<std::int64_t>(fs::file_size(dir / "m-1.safetensors") +
                                      fs::file_size(dir / "m-2.safetensors")));
  const std::string message = error_of([&] { checkpoint.get("c"); }, ErrorCode::kNotFound);
  EXPECT_NE(message.find("'c'"), std::string::npos);
}

TEST(Checkpoint, WithoutFilesNamesTheMissingOne) {
  const std::string message =
      error_of([] { Checkpoint::open(fresh_directory()); }, ErrorCode::kNotFound);
  EXPECT_NE(message.find("model.safetensors"), std::string::npos);
}

class BadShardNames : public ::testing::TestWithParam<const char*> {};

TEST_P(BadShardNames, AreRefused) {
  const fs::path dir = fresh_directory();
  write_text(dir / "m.safetensors", one("a"));
  write_text(dir / "model.safetensors.index.json",
             std::string(R"({"weight_map":{"a":)") + GetParam() + "}}");
  const std::string message = error_of([&] { Checkpoint::open(dir); }, ErrorCode::kInvalidFile);
  EXPECT_NE(message.find("weight_map['a']"), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(Checkpoint, BadShardNames,
                         ::testing::Values(R"("../m.safetensors")", R"("/etc/passwd")",
                                           R"("./m.safetensors")", R"("x/m.safetensors")",
                                           R"("..")", R"(".")", R"("")", R"("x\\m.safetensors")",
                                           R"("m.safetensors\u0000")", "1", "null", "[]"));

struct BadIndex {
  const char* label;
  const char* index;
  ErrorCode code;
  const char* message;
};

class BadIndexes : public ::testing::TestWithParam<BadIndex> {};

TEST_P(BadIndexes, AreRefused) {
  const fs::path dir = fresh_directory();
  write_text(dir / "m1", one("a"));
  write_text(dir / "m2", one("b"));
  write_text(dir / "again", one("a"));
  write_text(dir / "model.safetensors.index.json", GetParam().index);
  const std::string message = error_of([&] { Checkpoint::open(dir); }, GetParam().code);
  EXPECT_NE(message.find(GetParam().message), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(
    Checkpoint, BadIndexes,
    ::testing::Values(
        BadIndex{"MissingShard", R"({"weight_map":{"a":"gone"}})", ErrorCode::kNotFound, "gone"},
        BadIndex{"TensorInTwoShards", R"({"weight_map":{"a":"m1","b":"again"}})",
                 ErrorCode::kInvalidFile, "another shard"},
        BadIndex{"TensorElsewhere", R"({"weight_map":{"a":"m2","b":"m1"}})",
                 ErrorCode::kInvalidFile, "not listed"},
        BadIndex{"TensorUnlisted", R"({"weight_map":{"c":"m1"}})", ErrorCode::kInvalidFile,
                 "tensor 'a'"},
        BadIndex{"TensorAbsent", R"({"weight_map":{"a":"m1","c":"m1"}})", ErrorCode::kInvalidFile,
                 "tensor 'c'"},
        BadIndex{"ListedTwice", R"({"weight_map":{"a":"m1","a":"m2"}})", ErrorCode::kInvalidFile,
                 "appears twice"},
        BadIndex{"NoMap", "{}", ErrorCode::kInvalidFile, "weight_map"},
        BadIndex{"MapIsList", R"({"weight_map":[]})", ErrorCode::kInvalidFile, "weight_map"},
        BadIndex{"TopIsList", "[]", ErrorCode::kInvalidFile, "top level"},
        BadIndex{"NotJson", "{", ErrorCode::kInvalidFile, "JSON"}),
    [](const auto& info) { return std::string(info.param.label); });

// snapshots/REVISION/FILE -> ../../blobs/HASH, as the Hugging Face cache has it.
TEST(Checkpoint, LinksToRegularFilesAreFollowed) {
  const fs::path cache = fresh_directory();
  const fs::path snapshot = cache / "snapshots" / "0123";
  fs::create_directories(snapshot);
  fs::create_directories(cache / "blobs");
  write_text(cache / "blobs" / "aa", one("a"));
  fs::create_symlink("../../blobs/aa", snapshot / "model.safetensors");
  EXPECT_TRUE(Checkpoint::open(snapshot).has("a"));
}

TEST(Checkpoint, LinksToAnythingElseAreRefused) {
  const fs::path dir = fresh_directory();
  fs::create_symlink("nowhere", dir / "model.safetensors");
  error_of([&] { Checkpoint::open(dir); }, ErrorCode::kNotFound);
  fs::remove(dir / "model.safetensors");
  fs::create_symlink("/dev/zero", dir / "model.safetensors");
  const std::string message = error_of([&] { Checkpoint::open(dir); }, ErrorCode::kInvalidFile);
  EXPECT_NE(message.find("model.safetensors: not a regular file"), std::string::npos) << message;
}

TEST(Checkpoint, AReadBeyondTheNewEndIsAnError) {
  const fs::path dir = fresh_directory();
  const std::string header = R"({"a":{"dtype":"U8","shape":[100000],"data_offsets":[0,100000]}})";
  write_text(dir / "model.safetensors", raw_file(header, std::string(100000, 'x')));
  const Checkpoint checkpoint = Checkpoint::open(dir);
  checkpoint.check_reads();
  fs::resize_file(dir / "model.safetensors", 5000);
  checkpoint.check_reads();  // nothing was read yet
  EXPECT_EQ(checkpoint.get("a").data<const volatile char>()[99999], 0);
  const std::string message = error_of([&] { checkpoint.check_reads(); }, ErrorCode::kIo);
  EXPECT_NE(message.find("model.safetensors: the file changed"), std::string::npos) << message;
}

}  // namespace
}  // namespace snapmla::model
