#include "base/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <vector>

#include "snapmla/error.h"

namespace snapmla {
namespace {

TEST(ThreadPool, RunsEveryIterationOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (std::int64_t n : {0, 1, 3, 1000}) {
      std::vector<std::atomic<int>> hits(static_cast<std::size_t>(n));
      pool.parallel_for(n, [&](std::int64_t i) { ++hits[static_cast<std::size_t>(i)]; });
      for (const std::atomic<int>& h : hits) EXPECT_EQ(h.load(), 1);
    }
  }
}

TEST(ThreadPool, RethrowsAndStaysUsable) {
  ThreadPool pool(3);
  const auto fail_at_seven = [](std::int64_t i) {
    if (i == 7) throw std::runtime_error("seven");
  };
  EXPECT_THROW(pool.parallel_for(50, fail_at_seven), std::runtime_error);
  std::atomic<int> count = 0;
  pool.parallel_for(50, [&](std::int64_t) { ++count; });
  EXPECT_EQ(count.load(), 50);
}

TEST(ThreadPool, NestedLoopsRunInline) {
  ThreadPool pool(3);
  std::atomic<int> count = 0;
  pool.parallel_for(6, [&](std::int64_t) { pool.parallel_for(5, [&](std::int64_t) { ++count; }); });
  EXPECT_EQ(count.load(), 30);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// A thread's stack takes 8 MiB of address space, so a process of 1 GiB starts some, but not 2000.
TEST(ThreadPool, ThreadsThatDoNotStartAreAnError) {
  const auto construct = [] {
    const rlimit limit{rlim_t{1} << 30, rlim_t{1} << 30};
    setrlimit(RLIMIT_AS, &limit);
    try {
      const ThreadPool pool(2000);
      std::exit(1);
    } catch (const Error& e) {
      std::cerr << to_string(e.code()) << ' ' << e.what() << '\n';
      const ThreadPool again(2);  // the threads that had started are gone, and so are their stacks
      std::exit(0);
    }
  };
  EXPECT_EXIT(construct(), testing::ExitedWithCode(0),
              "^out_of_memory threads: got 2000, accepted are at most the [0-9]+ that the system "
              "starts \\(");
}
#endif

}  // namespace
}  // namespace snapmla
