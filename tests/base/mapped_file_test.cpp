#include "base/mapped_file.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <thread>
#include <vector>

#include "snapmla/error.h"

namespace snapmla {
namespace {

namespace fs = std::filesystem;

class MappedFiles : public testing::Test {
 protected:
  fs::path write(const std::string& name, std::size_t bytes) {
    const fs::path path =
        fs::path(testing::TempDir()) / ("snapmla-" + std::to_string(getpid()) + "-" + name);
    std::ofstream(path, std::ios::binary) << std::string(bytes, 'x');
    made_.push_back(path);
    return path;
  }
  void TearDown() override {
    for (const fs::path& path : made_) fs::remove(path);
  }

 private:
  std::vector<fs::path> made_;
};

std::string refusal(const MappedFile& file) {
  try {
    file.check();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kIo);
    return e.what();
  }
  return "";
}

TEST_F(MappedFiles, ReadsWhatIsThere) {
  const MappedFile file(write("plain", 10000));
  EXPECT_EQ(file.size(), 10000);
  EXPECT_EQ(file.data()[9999], 'x');
  EXPECT_EQ(refusal(file), "");
}

// Ten threads read a file whose end is gone: zeros for all of them, an error afterwards, and the
// other file is as it was.
TEST_F(MappedFiles, ATruncatedFileReadsAsZerosAndIsReported) {
  const fs::path path = write("cut", 40 * 4096);
  const MappedFile file(path), other(write("whole", 4 * 4096));
  fs::resize_file(path, 3 * 4096);
  EXPECT_FALSE(file.damaged());
  std::vector<std::thread> threads;
  std::vector<int> sums(10);
  for (std::size_t t = 0; t < sums.size(); ++t) {
    threads.emplace_back([&, t] {
      for (std::int64_t i = 0; i < file.size(); i += 64) sums[t] += file.data()[i] == 'x';
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int sum : sums) EXPECT_EQ(sum, 3 * 64);
  EXPECT_TRUE(file.damaged());
  EXPECT_NE(refusal(file).find(path.string() + ": the file changed while it was in use"),
            std::string::npos);
  EXPECT_FALSE(other.damaged());
  EXPECT_EQ(refusal(other), "");
}

TEST_F(MappedFiles, DamageIsReportedEvenWhenTheSizeIsBack) {
  const fs::path path = write("back", 4 * 4096);
  const MappedFile file(path);
  fs::resize_file(path, 4096);
  EXPECT_EQ(static_cast<const volatile std::uint8_t*>(file.data())[2 * 4096], 0);
  fs::resize_file(path, 4 * 4096);
  EXPECT_NE(refusal(file), "");
}

// A range that was given back is used again, and starts undamaged.
TEST_F(MappedFiles, MappingsComeAndGo) {
  const fs::path path = write("again", 4 * 4096);
  for (int i = 0; i < 20; ++i) {
    std::ofstream(path, std::ios::binary) << std::string(4 * 4096, 'x');
    const MappedFile file(path);
    EXPECT_EQ(refusal(file), "");
    fs::resize_file(path, 4096);
    EXPECT_EQ(static_cast<const volatile std::uint8_t*>(file.data())[3 * 4096], 0);
    EXPECT_TRUE(file.damaged());
  }
}

TEST_F(MappedFiles, WhatIsNoFileIsRefused) {
  EXPECT_THROW(MappedFile(testing::TempDir()), Error);
  EXPECT_THROW(MappedFile("/dev/zero"), Error);
  EXPECT_THROW(MappedFile(write("empty", 0)), Error);
  EXPECT_THROW(MappedFile("/nonexistent/file"), Error);
}

// A SIGBUS that is not ours ends the process as it always did.
using MappedFilesDeathTest = MappedFiles;
TEST_F(MappedFilesDeathTest, ForeignFaultsAreNotSwallowed) {
  const MappedFile ours(write("ours", 4096));
  const fs::path path = write("foreign", 4 * 4096);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizers report the signal in their own way";
#endif
  EXPECT_EXIT(
      {
        FILE* f = std::fopen(path.c_str(), "r");
        auto* data = static_cast<volatile char*>(
            mmap(nullptr, 4 * 4096, PROT_READ, MAP_PRIVATE, fileno(f), 0));
        fs::resize_file(path, 4096);
        const char c = data[3 * 4096];
        std::printf("%c", c);
        _exit(0);
      },
      testing::KilledBySignal(SIGBUS), "");
}

}  // namespace
}  // namespace snapmla
