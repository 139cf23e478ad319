#include "base/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base/check.h"

namespace snapmla {
namespace {

thread_local bool inside_loop = false;

int available_threads() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// PERF: the loops of a token of a small model follow one another within microseconds, and waking a
// thread that sleeps takes 5 to 50 us. So whoever waits looks for this long before it sleeps.
constexpr std::chrono::microseconds kSpin{15};

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks at ready() for kSpin at most; whether it was seen true.
template <class Ready>
bool spin_until(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      pause_briefly();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

}  // namespace

// A loop is open while its caller works on it. A worker that comes in time joins it; the caller
// closes it when nothing is left to hand out and waits for those who joined, never for a thread
// that has not woken up.
struct ThreadPool::Impl {
  std::mutex callers;  // one loop at a time
  std::mutex mutex;    // of everything below that is not atomic
  std::condition_variable start, done;
  std::vector<std::thread> workers;
  const std::function<void(std::int64_t)>* fn = nullptr;
  std::int64_t count = 0;
  std::atomic<std::int64_t> next{0};
  std::atomic<std::uint64_t> generation{0};  // of the loop; changed under the mutex
  std::atomic<int> joined{0};                // workers in the loop; changed under the mutex
  int asleep = 0;
  bool open = false, spin = true;
  std::atomic<bool> quit{false};
  std::exception_ptr error;

  void work() {
    inside_loop = true;
    try {
      for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) (*fn)(i);
    } catch (...) {
      next.store(count, std::memory_order_relaxed);
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
    inside_loop = false;
  }

  void stop() {
    {
      const std::lock_guard lock(mutex);
      quit = true;
    }
    start.notify_all();
    for (std::thread& worker : workers) worker.join();
  }

  void worker_loop() {
    std::uint64_t seen = 0;
    const auto called = [&] { return quit || generation != seen; };
    while (true) {
      if (spin) spin_until(called);
      std::unique_lock lock(mutex);
      ++asleep;
      start.wait(lock, called);
      --asleep;
      if (quit) return;
      seen = generation;
      if (!open) continue;
      ++joined;
      lock.unlock();
      work();
      lock.lock();
      if (--joined == 0) done.notify_one();
    }
  }

  void run(std::int64_t n, const std::function<void(std::int64_t)>& body) {
    int sleepers = 0;
    {
      const std::lock_guard lock(mutex);
      fn = &body;
      count = n;
      next.store(0, std::memory_order_relaxed);
      error = nullptr;
      open = true;
      ++generation;
      sleepers = asleep;
    }
    for (std::int64_t i = 0; i < std::min<std::int64_t>(sleepers, n - 1); ++i) start.notify_one();
    work();
    std::unique_lock lock(mutex);
    open = false;
    if (joined != 0 && spin) {
      lock.unlock();
      spin_until([&] { return joined == 0; });
      lock.lock();
    }
    done.wait(lock, [&] { return joined == 0; });
    if (error) std::rethrow_exception(error);
  }
};

ThreadPool::ThreadPool(int threads) : impl_(std::make_unique<Impl>()) {
  const int total = threads > 0 ? threads : available_threads();
  // Threads that share a processor must not keep each other from working.
  impl_->spin = total <= available_threads();
  try {
    for (int i = 1; i < total; ++i) {
      impl_->workers.emplace_back([impl = impl_.get()] { impl->worker_loop(); });
    }
  } catch (const std::exception& e) {  // std::system_error or std::bad_alloc
    const int started = num_threads();
    impl_->stop();  // a thread that is destroyed while it runs ends the process
    throw Error(ErrorCode::kOutOfMemory, str("threads: got ", total, ", accepted are at most the ",
                                             started, " that the system starts (", e.what(), ")"));
  }
}

ThreadPool::~ThreadPool() { impl_->stop(); }

int ThreadPool::num_threads() const { return static_cast<int>(impl_->workers.size()) + 1; }

void ThreadPool::parallel_for(std::int64_t n, const std::function<void(std::int64_t)>& fn) {
  if (inside_loop || n <= 1 || impl_->workers.empty()) {
    for (std::int64_t i = 0; i < n; ++i) fn(i);
    return;
  }
  const std::lock_guard one_caller(impl_->callers);
  impl_->run(n, fn);
}

}  // namespace snapmla
