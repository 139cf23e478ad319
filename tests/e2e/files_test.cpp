// Malformed model directories given to the real program: one clear line that names file and field,
// exit status 1, and no allocation that the files do not justify (the address space is limited).
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>

#include "e2e/process.h"
#include "model/checkpoint_files.h"

namespace snapmla::e2e {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::HasSubstr;
using testing_files::raw_file;
using testing_files::write_text;

constexpr std::int64_t kAddressSpace = std::int64_t{512} << 20;

std::string read_file(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// A checkpoint of 800 kB, o1 of the golden data; o6 for shards; the shipped one for a tokenizer.
fs::path copy_of(const std::string& name) {
  const fs::path dir = fresh_directory();
  const std::string from =
      name == "shipped" ? shipped_model() : SNAPMLA_SOURCE_DIR "/tests/oracles/" + name;
  for (const auto& entry : fs::directory_iterator(from)) {
    if (entry.is_regular_file() && entry.path().filename() != "golden.safetensors") {
      fs::copy_file(entry.path(), dir / entry.path().filename());
    }
  }
  return dir;
}

struct Fault {
  std::string name;
  std::string checkpoint;  // o1, o6 or shipped
  std::function<void(const fs::path& dir)> plant;
  std::vector<std::string> says;  // parts of the error line
};

void PrintTo(const Fault& fault, std::ostream* out) { *out << fault.name; }

std::string length_prefix(std::uint64_t length) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes;
}

// Whole file of weights from a header length and what follows.
Fault header(const std::string& name, std::uint64_t length, const std::string& rest) {
  return {"F1" + name,
          "o1",
          [=](const fs::path& dir) {
            write_text(dir / "model.safetensors", length_prefix(length) + rest);
          },
          {"model.safetensors: header"}};
}

// One tensor "a" of ten bytes described by `entry`.
Fault tensor(const std::string& name, const std::string& entry,
             const std::vector<std::string>& says) {
  return {"F2" + name, "o1",
          [=](const fs::path& dir) {
            write_text(dir / "model.safetensors",
                       raw_file("{\"a\":" + entry + "}", std::string(10, 'x')));
          },
          says};
}

// A merge patch to a JSON file.
Fault patch(const std::string& name, const std::string& checkpoint, const std::string& file,
            const json& change, const std::vector<std::string>& says) {
  return {name, checkpoint,
          [=](const fs::path& dir) {
            json value = json::parse(read_file(dir / file));
            value.merge_patch(change);
            fs::remove(dir / file);
            write_text(dir / file, value.dump());
          },
          says};
}

Fault text(const std::string& name, const std::string& checkpoint, const std::string& file,
           const std::string& content, const std::vector<std::string>& says) {
  return {name, checkpoint, [=](const fs::path& dir) { write_text(dir / file, content); }, says};
}

std::vector<Fault> header_faults() {
  return {
      header("Zero", 0, "{}"),
      {"F1One",
       "o1",
       [](const fs::path& d) { write_text(d / "model.safetensors", length_prefix(1) + "{"); },
       {"model.safetensors: not valid JSON"}},
      header("Seven", 7, "nothing"),
      header("PastTheEnd", 1000, "{}"),
      header("AboveTheLimit", 100'000'001, "{}"),
      header("TwoTo63", std::uint64_t{1} << 63, "{}"),
      header("AllOnes", ~std::uint64_t{0}, "{}"),
      header("WrapsTheEnd", ~std::uint64_t{0} - 7, "{}"),
      {"F1Empty",
       "o1",
       [](const fs::path& d) { write_text(d / "model.safetensors", ""); },
       {"model.safetensors", "empty"}},
      {"F1FiveBytes",
       "o1",
       [](const fs::path& d) { write_text(d / "model.safetensors", "12345"); },
       {"model.safetensors", "got 5 bytes"}},
      {"F1NotJson",
       "o1",
       [](const fs::path& d) { write_text(d / "model.safetensors", raw_file("{\"a\":", "")); },
       {"model.safetensors", "not valid JSON"}},
  };
}

std::vector<Fault> tensor_faults() {
  return {
      tensor("BeginAfterEnd", R"({"dtype":"U8","shape":[10],"data_offsets":[10,0]})",
             {"tensor 'a': data_offsets: got [10, 0)"}),
      tensor("Negative", R"({"dtype":"U8","shape":[10],"data_offsets":[-1,9]})",
             {"tensor 'a': data_offsets"}),
      tensor("PastTheEnd", R"({"dtype":"U8","shape":[11],"data_offsets":[0,11]})",
             {"tensor 'a': data_offsets: got [0, 11)"}),
      tensor("ShapeWraps", R"({"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]})",
             {"tensor 'a': shape: the number of bytes exceeds 64 bits"}),
      tensor("ShapeTooLong", R"({"dtype":"U8","shape":[1,1,1,1,1,10],"data_offsets":[0,10]})",
             {"a.shape"}),
      tensor("SpanIsNotShape", R"({"dtype":"F32","shape":[10],"data_offsets":[0,10]})",
             {"tensor 'a': data_offsets"}),
      tensor("UnknownType", R"({"dtype":"F4","shape":[10],"data_offsets":[0,10]})",
             {"a.dtype: got \"F4\""}),
      tensor("NoOffsets", R"({"dtype":"U8","shape":[10]})", {"a.data_offsets: got nothing"}),
      tensor("Hole", R"({"dtype":"U8","shape":[4],"data_offsets":[0,4]})",
             {"data section: got 10 bytes, the tensors describe 4"}),
      tensor("Overlap",
             R"({"dtype":"U8","shape":[6],"data_offsets":[0,6]},)"
             R"("b":{"dtype":"U8","shape":[6],"data_offsets":[4,10]})",
             {"a gap or an overlap at byte 4"}),
      tensor("TwiceTheSameKey",
             R"({"dtype":"U8","shape":[10],"data_offsets":[0,10]},)"
             R"("a":{"dtype":"U8","shape":[10],"data_offsets":[0,10]})",
             {"key 'a' appears twice"}),
      tensor("Missing", R"({"dtype":"U8","shape":[10],"data_offsets":[0,10]})", {"weights: got"}),
      {"F3Truncated",
       "o1",
       [](const fs::path& d) { fs::resize_file(d / "model.safetensors", 700'000); },
       {"model.safetensors", "data_offsets"}},
  };
}

std::vector<Fault> index_faults() {
  const char* index = "model.safetensors.index.json";
  const auto shard = [&](const std::string& name, const json& value) {
    return patch("F4" + name, "o6", index, {{"weight_map", {{"model.norm.weight", value}}}},
                 {"model.safetensors.index.json: weight_map['model.norm.weight']: got '"});
  };
  return {
      shard("Parent", "../model.safetensors"),
      shard("Absolute", "/etc/passwd"),
      shard("Folder", "sub/model.safetensors"),
      shard("Backslash", "..\\model"),
      shard("Hidden", ".hidden"),
      shard("NotText", 7),
      shard("Nul", std::string("a\0b", 3)),
      patch("F4MissingShard", "o6", index, {{"weight_map", {{"x", "absent.safetensors"}}}},
            {"absent.safetensors: No such file"}),
      patch("F4NotListed", "o6", index, {{"weight_map", {{"model.norm.weight", nullptr}}}},
            {"weight_map: tensor 'model.norm.weight'", "is not listed"}),
      patch("F4NotThere", "o6", index,
            {{"weight_map", {{"extra", "model-00001-of-00002.safetensors"}}}},
            {"weight_map: tensor 'extra' is not in model-00001-of-00002.safetensors"}),
      text("F4NoMap", "o6", index, "{}", {"weight_map: got nothing"}),
      {"F4TwoShardsOneTensor",
       "o6",
       [](const fs::path& d) {
         fs::copy_file(d / "model-00001-of-00002.safetensors", d / "again.safetensors");
         json value = json::parse(read_file(d / "model.safetensors.index.json"));
         value["weight_map"]["x"] = "again.safetensors";
         write_text(d / "model.safetensors.index.json", value.dump());
       },
       {"is in another shard too"}},
      {"F4LinkToADevice",
       "o1",
       [](const fs::path& d) {
         fs::remove(d / "model.safetensors");
         fs::create_symlink("/dev/zero", d / "model.safetensors");
       },
       {"model.safetensors: not a regular file"}},
  };
}

std::vector<Fault> config_faults() {
  const auto field = [](const std::string& name, const std::string& key, const json& value) {
    return patch("F5" + name, "o1", "config.json", {{key, value}}, {"config.json: " + key});
  };
  return {
      field("Negative", "hidden_size", -64),
      field("Huge", "vocab_size", 1e30),
      field("Text", "num_attention_heads", "2"),
      field("BillionLayers", "num_hidden_layers", 1'000'000'000),
      field("HeadsTimesDimWraps", "qk_nope_head_dim", std::int64_t{1} << 62),
      field("PositionsHuge", "max_position_embeddings", std::int64_t{1} << 40),
      text("F5NaN", "o1", "config.json", R"({"model_type": NaN})", {"config.json: not valid JSON"}),
      text("F5Nested", "o1", "config.json", std::string(10 << 20, '['),
           {"config.json: nested deeper than"}),
      text("F5Twice", "o1", "config.json", R"({"model_type":"a","model_type":"b"})",
           {"config.json: key 'model_type' appears twice"}),
      text("F5Other", "o1", "config.json", R"({"model_type":"llama"})",
           {"config.json: model_type: got 'llama'", "accepted are deepseek_v2"}),
      // In range one by one, but far more than the file of weights holds.
      patch("F5MoreThanTheFile", "o1", "config.json",
            {{"num_hidden_layers", 1000}, {"intermediate_size", 1 << 22}}, {"weights: got"}),
      patch("F5ExpertsMoreThanTheFile", "o1", "config.json",
            {{"n_routed_experts", 65536}, {"num_hidden_layers", 1000}}, {"weights: got"}),
      patch("F5ShapeMismatch", "o1", "config.json", {{"v_head_dim", 8}},
            {"tensor 'model.layers.0.self_attn", "got shape [", "accepted is ["}),
      {"F5None",
       "o1",
       [](const fs::path& d) { fs::remove(d / "config.json"); },
       {"config.json: no such file"}},
      {"F5Directory",
       "o1",
       [](const fs::path& d) {
         fs::remove(d / "config.json");
         fs::create_directory(d / "config.json");
       },
       {"config.json: got a directory, accepted is a regular file"}},
      {"F5Fifo",
       "o1",
       [](const fs::path& d) {
         fs::remove(d / "config.json");
         mkfifo((d / "config.json").c_str(), 0600);
       },
       {"config.json: got something that is neither file nor directory, accepted is a regular"}},
      {"F5LinkToItself",
       "o1",
       [](const fs::path& d) {
         fs::remove(d / "config.json");
         fs::create_symlink("config.json", d / "config.json");
       },
       {"config.json: Too many levels of symbolic links"}},
  };
}

std::vector<Fault> tokenizer_faults() {
  const char* file = "tokenizer.json";
  const auto edit = [&](const std::string& name, const std::function<void(json&)>& change,
                        const std::vector<std::string>& says) {
    return Fault{"F6" + name, "shipped",
                 [=](const fs::path& d) {
                   json value = json::parse(read_file(d / "tokenizer.json"));
                   change(value);
                   write_text(d / "tokenizer.json", value.dump());
                 },
                 says};
  };
  return {
      edit("MergeOfUnknown",
           [](json& t) {
             t["model"]["merges"][5] = {"zz", "zzzz"};
           },
           {"tokenizer.json: model.merges[5]"}),
      {"F6TenMillionMerges",
       "shipped",
       [](const fs::path& d) {
         std::string text = R"({"model":{"type":"BPE","vocab":{"a":0},"merges":[)";
         for (int i = 0; i < 10'000'000; ++i) text += R"(["a","a"],)";
         write_text(d / "tokenizer.json", text + "0]}}");
       },
       {"tokenizer.json: more than 4000000 values"}},
      edit("MergesNoList", [](json& t) { t["model"]["merges"] = 3; },
           {"tokenizer.json: model.merges: got 3"}),
      edit("IdTooLarge", [](json& t) { t["model"]["vocab"]["zzz"] = 1 << 24; },
           {"tokenizer.json: model.vocab['zzz']"}),
      edit("IdNegative", [](json& t) { t["model"]["vocab"]["zzz"] = -1; },
           {"tokenizer.json: model.vocab['zzz']"}),
      edit("IdTwice", [](json& t) { t["model"]["vocab"]["zzz"] = 300; },
           {"tokenizer.json: model.vocab: id 300 is given to two tokens"}),
      edit("EmptyToken", [](json& t) { t["model"]["vocab"][""] = 2050; },
           {"tokenizer.json: model.vocab: got a token of 0 bytes"}),
      edit("OtherModel", [](json& t) { t["model"]["type"] = "Unigram"; },
           {"tokenizer.json: ", "Unigram"}),
      edit("BadRegex",
           [](json& t) { t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(((["; },
           {"tokenizer.json: ", "pre_tokenizer"}),
      edit("CatastrophicRegex",
           [](json& t) {
             t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(x+x+)+[^x]";
           },
           {"limit"}),
      text("F6NotJson", "shipped", file, "{\"model\":", {"tokenizer.json: not valid JSON"}),
      text("F6Nested", "shipped", file, std::string(1 << 20, '['),
           {"tokenizer.json: nested deeper"}),
      {"F6None",
       "shipped",
       [](const fs::path& d) { fs::remove(d / "tokenizer.json"); },
       {"tokenizer.json: no such file"}},
  };
}

std::vector<Fault> all_faults() {
  std::vector<Fault> all;
  for (const auto& some :
       {header_faults(), tensor_faults(), index_faults(), config_faults(), tokenizer_faults()}) {
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

Result load(const fs::path& dir, bool with_text) {
  Launch launch;
  launch.timeout_s = 20;
  if (!sanitized()) launch.address_space = kAddressSpace;
  const std::string model = dir.string();
  return with_text ? snapmla({"run", "-m", model, "-n", "1", "-t", "2", "-p", std::string(60, 'x')},
                             launch)
                   : snapmla({"logits", "-m", model, "--tokens", "1,2", "-c", "256", "-t", "2",
                              "-o", model + "/logits"},
                             launch);
}

class Malformed : public testing::TestWithParam<Fault> {};

TEST_P(Malformed, IsOneClearErrorLine) {
  const Fault& fault = GetParam();
  const fs::path dir = copy_of(fault.checkpoint);
  fault.plant(dir);
  const Result r = load(dir, fault.checkpoint == "shipped");
  EXPECT_EQ(r.status, 1);
  EXPECT_EQ(r.out, "");
  EXPECT_EQ(lines(r.err).size(), 1u) << r.err;
  EXPECT_LE(r.err.size(), 600u) << r.err;
  EXPECT_THAT(r.err, testing::StartsWith("snapmla: error: "));
  EXPECT_THAT(r.err, HasSubstr(dir.string()));
  EXPECT_THAT(r.err, testing::Not(HasSubstr("json.exception")));
  for (const std::string& part : fault.says) EXPECT_THAT(r.err, HasSubstr(part));
}

INSTANTIATE_TEST_SUITE_P(Files, Malformed, testing::ValuesIn(all_faults()),
                         [](const auto& info) { return info.param.name; });

// The limit that the faults run under is one that sound checkpoints fit into.
TEST(Sound, CheckpointsLoadUnderTheSameLimit) {
  for (const char* name : {"o1", "o6", "shipped"}) {
    const Result r = load(copy_of(name), std::string(name) == "shipped");
    EXPECT_EQ(r.status, 0) << name << ": " << r.err;
  }
}

TEST(Missing, ModelDirectory) {
  for (const char* command : {"run", "inspect", "logits"}) {
    std::vector<std::string> args = {command, "-m", "/no/such/model"};
    if (std::string(command) == "run") args.insert(args.end(), {"-p", "x"});
    if (std::string(command) == "logits") args.insert(args.end(), {"--tokens", "1", "-o", "x"});
    const Result r = snapmla(args);
    EXPECT_EQ(r.status, 1);
    EXPECT_EQ(r.err, "snapmla: error: /no/such/model/config.json: no such file\n");
  }
}

}  // namespace
}  // namespace snapmla::e2e
