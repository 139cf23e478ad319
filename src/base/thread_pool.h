// A fixed set of threads that run the iterations of a loop. The caller works too.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace snapmla {

class ThreadPool {
 public:
  // `threads` <= 0: as many as the process may use (its affinity mask). Throws kOutOfMemory when
  // the system starts fewer than that.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Calls fn(i) for every i in [0, n), each exactly once, and returns when all are done. Iterations
  // are handed out dynamically. The first exception thrown by fn is rethrown here after the others
  // ended. Calls from inside fn run inline (no nesting); calls from several threads are serialised.
  void parallel_for(std::int64_t n, const std::function<void(std::int64_t)>& fn);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace snapmla
