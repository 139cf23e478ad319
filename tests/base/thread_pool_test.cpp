#include "base/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <thread>
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

// Loops as short as a token's: workers come too late for some, look for the next or have fallen
// asleep, and more threads than processors do not look at all. Every loop must still see its own
// body and all of its iterations, whichever thread calls.
TEST(ThreadPool, ManyShortLoopsFromSeveralThreads) {
  for (int threads : {2, 3, 9}) {
    ThreadPool pool(threads);
    std::atomic<int> wrong = 0;
    const auto call = [&](std::int64_t first) {
      for (std::int64_t round = 0; round < 600; ++round) {
        const std::int64_t n = (first + round) % 5;
        std::atomic<std::int64_t> sum = 0;
        const std::int64_t base = 1000 * (round + 1);
        // Items that sleep let workers in, and end after the caller's own.
        const auto pause = std::chrono::microseconds(round % 10 == 0 ? 50 : 0);
        pool.parallel_for(n, [&](std::int64_t i) {
          if (pause.count() > 0) std::this_thread::sleep_for(pause * (i + 1));
          sum += base + i;
        });
        wrong += sum != n * base + n * (n - 1) / 2;
        if (round % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    };
    std::thread other([&] { call(3); });
    call(0);
    other.join();
    EXPECT_EQ(wrong, 0) << threads << " threads";
  }
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
