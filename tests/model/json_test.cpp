// Reading a file of JSON: what the errors say.
#include "model/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <iostream>

#include "model/checkpoint_files.h"
#include "snapmla/error.h"

namespace snapmla::model {
namespace {

namespace fs = std::filesystem;

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& e) {
    return std::string(to_string(e.code())) + " " + e.what();
  }
  return "no error";
}

TEST(Json, MessagesDoNotCarryTheParsersNameForTheError) {
  for (const char* text : {"", "{", "[1,", "{\"a\": nan}", "\"\\ud800\"", "1e999"}) {
    const std::string error = error_of([&] { parse_json(text, "x.json"); });
    EXPECT_THAT(error, testing::StartsWith("invalid_file x.json: not valid JSON")) << text;
    EXPECT_THAT(error, testing::Not(testing::HasSubstr("json.exception"))) << text;
    EXPECT_GT(error.size(), 50u) << "the reason is missing: " << error;
  }
}

TEST(ReadText, WhatIsNoRegularFileIsNamedForWhatItIs) {
  const fs::path dir = fs::path(testing::TempDir()) / ("read-text-" + std::to_string(getpid()));
  fs::create_directories(dir);
  const auto error = [&](const char* name) {
    return error_of([&] { read_text(dir / name, 100); });
  };
  const std::string at = dir.string();
  EXPECT_EQ(error("none"), "not_found " + at + "/none: no such file");
  EXPECT_EQ(error("."), "invalid_file " + at + "/.: got a directory, accepted is a regular file");
  ASSERT_EQ(mkfifo((dir / "fifo").c_str(), 0600), 0);
  EXPECT_EQ(error("fifo"), "invalid_file " + at +
                               "/fifo: got something that is neither file nor directory, accepted "
                               "is a regular file");
  fs::create_symlink("loop", dir / "loop");
  EXPECT_EQ(error("loop"), "io " + at + "/loop: Too many levels of symbolic links");
  fs::remove_all(dir);
}

// Root may read everything, so the child that tries becomes somebody else.
TEST(ReadText, AFileWithoutPermissionSaysSo) {
  const fs::path file =
      fs::path(testing::TempDir()) / ("read-text-" + std::to_string(getpid()) + ".json");
  testing_files::write_text(file, "{}");
  fs::permissions(file, fs::perms::none);
  const auto attempt = [&] {
    // _Exit: another user's process has no rights for a leak check at its end.
    if (geteuid() == 0 && seteuid(65534) != 0) std::_Exit(2);
    std::cerr << error_of([&] { read_text(file, 100); }) << '\n';
    std::_Exit(0);
  };
  EXPECT_EXIT(attempt(), testing::ExitedWithCode(0), "^io .*\\.json: Permission denied");
  fs::remove(file);
}

}  // namespace
}  // namespace snapmla::model
