// The machine's limits by two small kernels of our own, on all threads at once.
#include "bench.h"

#undef HWY_TARGET_INCLUDE
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#define HWY_TARGET_INCLUDE "bench_machine.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace snapmla::app::bench {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 12 chains of multiply-adds in registers hide the latency of every processor of the last decade.
// Returns something that depends on all of them.
float MultiplyAdd(std::int64_t rounds) {
  const hn::ScalableTag<float> d;
  const auto x = hn::Set(d, 0.999f), y = hn::Set(d, 0.001f);
  auto a = hn::Iota(d, 0.0f), b = hn::Iota(d, 1.0f), c = hn::Iota(d, 2.0f), e = hn::Iota(d, 3.0f);
  auto f = hn::Iota(d, 4.0f), g = hn::Iota(d, 5.0f), h = hn::Iota(d, 6.0f), i = hn::Iota(d, 7.0f);
  auto j = hn::Iota(d, 8.0f), k = hn::Iota(d, 9.0f), l = hn::Iota(d, 1.5f), m = hn::Iota(d, 2.5f);
  for (std::int64_t n = 0; n < rounds; ++n) {
    a = hn::MulAdd(a, x, y), b = hn::MulAdd(b, x, y), c = hn::MulAdd(c, x, y);
    e = hn::MulAdd(e, x, y), f = hn::MulAdd(f, x, y), g = hn::MulAdd(g, x, y);
    h = hn::MulAdd(h, x, y), i = hn::MulAdd(i, x, y), j = hn::MulAdd(j, x, y);
    k = hn::MulAdd(k, x, y), l = hn::MulAdd(l, x, y), m = hn::MulAdd(m, x, y);
  }
  const auto sum = hn::Add(hn::Add(hn::Add(a, b), hn::Add(c, e)), hn::Add(f, g));
  const auto rest = hn::Add(hn::Add(hn::Add(h, i), hn::Add(j, k)), hn::Add(l, m));
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(sum, rest)));
}

std::int64_t FlopsPerRound() {
  return 12 * 2 * static_cast<std::int64_t>(hn::Lanes(hn::ScalableTag<float>()));
}

// Sum of n floats, n a multiple of 8 vectors.
float Read(const float* from, std::int64_t n) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  auto a = hn::Zero(d), b = a, c = a, e = a;
  for (std::int64_t i = 0; i < n; i += 4 * lanes) {
    a = hn::Add(a, hn::LoadU(d, from + i));
    b = hn::Add(b, hn::LoadU(d, from + i + lanes));
    c = hn::Add(c, hn::LoadU(d, from + i + 2 * lanes));
    e = hn::Add(e, hn::LoadU(d, from + i + 3 * lanes));
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(a, b), hn::Add(c, e))));
}

}  // namespace HWY_NAMESPACE
}  // namespace snapmla::app::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <atomic>
#include <chrono>

#include "base/thread_pool.h"

namespace snapmla::app::bench {
namespace {

HWY_EXPORT(MultiplyAdd);
HWY_EXPORT(FlopsPerRound);
HWY_EXPORT(Read);

constexpr std::int64_t kRounds = 400'000;     // one to two milliseconds
constexpr std::int64_t kShares = 8;           // of every thread, one after the other
constexpr std::int64_t kFloats = 64ll << 20;  // 256 MiB: more than any cache here
constexpr std::int64_t kSlice = 256 << 10;    // floats of one work item

template <class Fn>
double seconds(const Fn& fn) {
  const auto start = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

struct LimitProbe::Impl {
  explicit Impl(int threads) : pool(threads), memory(static_cast<std::size_t>(kFloats), 1.0f) {}
  ThreadPool pool;
  std::vector<float> memory;
  std::atomic<float> sink{0};  // keeps the results, hence the work, alive
};

LimitProbe::LimitProbe(int threads) : impl_(std::make_unique<Impl>(threads)) {}
LimitProbe::~LimitProbe() = default;

Limits LimitProbe::measure() {
  Limits limits;
  Impl& m = *impl_;
  const std::int64_t threads = m.pool.num_threads();
  const double work = static_cast<double>(kRounds * HWY_DYNAMIC_DISPATCH(FlopsPerRound)());
  // Every thread's best share counts: one that the system interrupted says nothing about the limit.
  std::vector<double> best(static_cast<std::size_t>(threads), 0.0);
  const auto multiply = [&](std::int64_t thread) {
    for (std::int64_t i = 0; i < kShares; ++i) {
      const double s = seconds([&] { m.sink = HWY_DYNAMIC_DISPATCH(MultiplyAdd)(kRounds); });
      double& mine = best[static_cast<std::size_t>(thread)];
      mine = std::max(mine, work / s / 1e9);
    }
  };
  const auto read = [&] {
    m.pool.parallel_for(kFloats / kSlice, [&](std::int64_t i) {
      m.sink = HWY_DYNAMIC_DISPATCH(Read)(m.memory.data() + i * kSlice, kSlice);
    });
  };
  m.pool.parallel_for(threads, multiply);
  limits.gflops = *std::max_element(best.begin(), best.end()) * static_cast<double>(threads);
  for (int repeat = 0; repeat < 3; ++repeat) {
    limits.keep_best({limits.gflops, kFloats * 4.0 / seconds(read) / 1e9});
  }
  return limits;
}

}  // namespace snapmla::app::bench
#endif
