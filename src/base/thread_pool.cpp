#include "base/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
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

}  // namespace

struct ThreadPool::Impl {
  std::mutex callers;  // one loop at a time
  std::mutex mutex;
  std::condition_variable start, done;
  std::vector<std::thread> workers;
  const std::function<void(std::int64_t)>* fn = nullptr;
  std::int64_t count = 0;
  std::atomic<std::int64_t> next{0};
  std::uint64_t generation = 0;
  int active = 0;
  bool quit = false;
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
    std::unique_lock lock(mutex);
    while (true) {
      start.wait(lock, [&] { return quit || generation != seen; });
      if (quit) return;
      seen = generation;
      lock.unlock();
      work();
      lock.lock();
      if (--active == 0) done.notify_one();
    }
  }
};

ThreadPool::ThreadPool(int threads) : impl_(std::make_unique<Impl>()) {
  const int total = threads > 0 ? threads : available_threads();
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
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->fn = &fn;
    impl_->count = n;
    impl_->next.store(0, std::memory_order_relaxed);
    impl_->error = nullptr;
    impl_->active = static_cast<int>(impl_->workers.size());
    ++impl_->generation;
  }
  impl_->start.notify_all();
  impl_->work();
  std::unique_lock lock(impl_->mutex);
  impl_->done.wait(lock, [&] { return impl_->active == 0; });
  if (impl_->error) std::rethrow_exception(impl_->error);
}

}  // namespace snapmla
