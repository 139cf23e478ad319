// What a user builds on: the installed tree with find_package(snapmla) alone, the examples, and
// every command and program that README.md shows.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "e2e/process.h"

namespace snapmla::e2e {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

std::string read_file(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  return {std::istreambuf_iterator<char>(in), {}};
}

Result shell(const std::string& command, const fs::path& directory, const std::string& input = "") {
  Launch launch;
  launch.input = input;
  launch.timeout_s = 240;
  return run_program("/bin/bash", {"-c", "cd '" + directory.string() + "' && " + command}, launch);
}

struct Block {
  std::string language, text;
};

// The fenced code blocks of a Markdown file.
std::vector<Block> code_blocks(const std::string& file) {
  std::vector<Block> blocks;
  bool inside = false;
  for (const std::string& line : lines(read_file(fs::path(SNAPMLA_SOURCE_DIR) / file))) {
    if (line.starts_with("```")) {
      inside = !inside;
      if (inside) blocks.push_back({line.substr(3), ""});
    } else if (inside) {
      blocks.back().text += line + "\n";
    }
  }
  EXPECT_FALSE(inside) << file << ": a code block is not closed";
  return blocks;
}

std::vector<std::string> blocks_in(const std::string& file, const std::string& language) {
  std::vector<std::string> texts;
  for (const Block& block : code_blocks(file)) {
    if (block.language == language) texts.push_back(block.text);
  }
  return texts;
}

// What a generated text must show to be worth an example: characters that are seen.
std::size_t visible(const std::string& text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](unsigned char c) { return c > ' '; }));
}

// The model's texts in what `snapmla run` wrote to standard output.
std::vector<std::string> texts_of(const std::string& line, const std::string& out) {
  if (line.find("--compare") == std::string::npos) return {out};
  const std::string first = "\n--- BF16 cache\n", second = "\n--- FP8 cache\n", third = "\n---\n";
  const std::size_t a = out.find(first), b = out.find(second), c = out.find(third);
  if (a == std::string::npos || b == std::string::npos || c == std::string::npos) return {""};
  return {out.substr(a + first.size(), b - a - first.size()),
          out.substr(b + second.size(), c - b - second.size())};
}

class Installed : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    root_ = fresh_directory();
    const Result r = shell(
        SNAPMLA_CMAKE " --install " SNAPMLA_BUILD_DIR " --prefix " + (root_ / "prefix").string(),
        root_);
    ASSERT_EQ(r.status, 0) << r.out << r.err;
  }

  // Configures and builds a project that may know the installed tree alone.
  static void build(const fs::path& source, const fs::path& to) {
    const std::string configure = std::string(SNAPMLA_CMAKE) + " -S " + source.string() + " -B " +
                                  to.string() + " -G '" SNAPMLA_GENERATOR "'" +
                                  " -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_COMPILER=" SNAPMLA_CXX
                                  " -DCMAKE_CXX_FLAGS='-Wall -Wextra -Werror'"
                                  " -DCMAKE_PREFIX_PATH=" +
                                  (root_ / "prefix").string();
    Result r = shell(configure, root_);
    ASSERT_EQ(r.status, 0) << r.out << r.err;
    r = shell(std::string(SNAPMLA_CMAKE) + " --build " + to.string(), root_);
    ASSERT_EQ(r.status, 0) << r.out << r.err;
    // Nothing of the source tree may have been used.
    EXPECT_THAT(read_file(to / "CMakeCache.txt"),
                HasSubstr("snapmla_DIR:PATH=" + (root_ / "prefix").string()));
  }

  static fs::path root_;
};
fs::path Installed::root_;

TEST_F(Installed, ExamplesBuildWithFindPackageAndRun) {
  const fs::path built = root_ / "examples";
  ASSERT_NO_FATAL_FAILURE(build(fs::path(SNAPMLA_SOURCE_DIR) / "examples", built));
  const Result text = run_program(built / "generate", {shipped_model()});
  EXPECT_EQ(text.status, 0) << text.err;
  const Result want = snapmla({"run", "-p", "import numpy as", "-n", "40"});
  EXPECT_EQ(text.out.rfind(want.out, 0), 0u) << text.out << want.out;
  EXPECT_THAT(text.out, testing::ContainsRegex("\n[0-9]+ tokens, 206080 cache bytes\n$"));

  const Result decode = run_program(built / "decode", {});
  EXPECT_EQ(decode.status, 0) << decode.out;
  EXPECT_THAT(decode.out, HasSubstr(std::to_string(4 * 41216) + " bytes of cache for 200 tokens"));

  if (fs::exists(built / "decode_cuda")) {  // where the CUDA toolkit is; it runs on a Hopper GPU
    const Result cuda = run_program(built / "decode_cuda", {});
    EXPECT_THAT(cuda.out, cuda.status == 77 ? testing::StartsWith("not run: ")
                                            : testing::StartsWith("48 heads, two graph replays"));
    EXPECT_TRUE(cuda.status == 0 || cuda.status == 77) << cuda.out << cuda.err;
  }

  const Result missing = run_program(built / "generate", {"/no/such/model"});
  EXPECT_EQ(missing.status, 1);
  EXPECT_EQ(missing.err, "/no/such/model/config.json: no such file\n");
}

TEST_F(Installed, ProgramFindsTheModelBesideIt) {
  const Result r = run_program(root_ / "prefix/bin/snapmla", {"inspect"});
  EXPECT_EQ(r.status, 0) << r.err;
  const std::string dir = (root_ / "prefix/share/snapmla/snapmla-20m").string();
  EXPECT_THAT(r.out, testing::StartsWith("checkpoint             " + dir + "\n"));
}

// README's C++ with README's CMake lines around it.
TEST_F(Installed, ReadmeProgramsCompileAndRun) {
  const std::vector<std::string> cmake = blocks_in("README.md", "cmake");
  const std::vector<std::string> programs = blocks_in("README.md", "cpp");
  ASSERT_EQ(cmake.size(), 1u);
  ASSERT_GE(programs.size(), 1u);
  for (std::size_t i = 0; i < programs.size(); ++i) {
    const fs::path dir = root_ / ("readme" + std::to_string(i));
    fs::create_directories(dir);
    std::ofstream(dir / "main.cpp") << programs[i];
    std::ofstream(dir / "CMakeLists.txt") << "cmake_minimum_required(VERSION 3.25)\n"
                                             "project(app LANGUAGES CXX)\n"
                                             "add_executable(app main.cpp)\n"
                                          << cmake[0];
    ASSERT_NO_FATAL_FAILURE(build(dir, dir / "build"));
    const Result r = shell((dir / "build/app").string(), SNAPMLA_SOURCE_DIR);
    EXPECT_EQ(r.status, 0) << r.err;
    const std::vector<std::string> said = lines(r.out);
    ASSERT_GE(said.size(), 2u) << r.out;
    EXPECT_THAT(said.back(), testing::EndsWith(" bytes of cache"));
    EXPECT_GE(visible(r.out.substr(0, r.out.find(said.back()))), 10u) << r.out;
  }
}

// Every line of README's shell blocks is a command of this program or one that is known here.
TEST(Readme, CommandsRun) {
  const fs::path dir = fresh_directory();
  int ran = 0;
  for (const std::string& block : blocks_in("README.md", "bash")) {
    for (const std::string& line : lines(block)) {
      if (line.empty() || line.starts_with("#") || line.starts_with("git clone") ||
          line.starts_with("cd ") || line.starts_with("./test") ||
          line.starts_with("cmake --install build")) {
        continue;
      }
      ASSERT_TRUE(line == "./run" || line.starts_with("./run ")) << line;
      const Result r = shell(SNAPMLA_BINARY + line.substr(5), dir, "What is 2 + 2?");
      EXPECT_EQ(r.status, 0) << line << "\n" << r.err;
      EXPECT_THAT(r.err, testing::Not(HasSubstr("error"))) << line;
      if (line.starts_with("./run run ")) {
        const bool chat = line.find("--chat") != std::string::npos;  // may answer in one word
        for (const std::string& text : texts_of(line, r.out)) {
          EXPECT_GE(visible(text), chat ? 1u : 10u) << line << "\n" << r.out;
        }
      }
      ++ran;
    }
  }
  EXPECT_GE(ran, 5);
}

// Files and directories that the documents name exist.
TEST(Readme, PathsExist) {
  int found = 0;
  for (const char* file : {"README.md", "HACKING.md"}) {
    const std::string text = read_file(fs::path(SNAPMLA_SOURCE_DIR) / file);
    for (const char* top : {"docs/", "tools/", "models/", "tests/", "examples/", "include/"}) {
      for (std::size_t at = 0; (at = text.find(top, at)) != std::string::npos; ++at) {
        if (at > 0 && (isalnum(static_cast<unsigned char>(text[at - 1])) || text[at - 1] == '/' ||
                       text[at - 1] == '-')) {
          continue;  // the end of a longer path
        }
        std::size_t end = at;
        while (end < text.size() &&
               (isalnum(static_cast<unsigned char>(text[end])) ||
                std::string_view("/._-").find(text[end]) != std::string::npos)) {
          ++end;
        }
        std::string path = text.substr(at, end - at);
        while (path.ends_with(".")) path.pop_back();
        EXPECT_TRUE(fs::exists(fs::path(SNAPMLA_SOURCE_DIR) / path)) << file << ": " << path;
        ++found;
      }
    }
  }
  EXPECT_GE(found, 5);
}

}  // namespace
}  // namespace snapmla::e2e
