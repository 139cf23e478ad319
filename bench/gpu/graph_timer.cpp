#include "graph_timer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <thread>

namespace snapmla::gpu {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double mean(const std::vector<double>& values) {
  if (values.empty()) return 0;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

class Event {
 public:
  Event() { SNAPMLA_CUDA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) { SNAPMLA_CUDA_CHECK(cudaEventRecord(event_, stream)); }
  bool done() const {
    const cudaError_t status = cudaEventQuery(event_);
    if (status == cudaErrorNotReady) return false;
    SNAPMLA_CUDA_CHECK(status);
    return true;
  }
  void wait() const { SNAPMLA_CUDA_CHECK(cudaEventSynchronize(event_)); }
  double ms_since(const Event& start) const {
    float ms = 0;
    SNAPMLA_CUDA_CHECK(cudaEventElapsedTime(&ms, start.event_, event_));
    return ms;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace

double TimingSamples::quantile(double q) const {
  if (us.empty()) return 0;
  std::vector<double> sorted = us;
  std::sort(sorted.begin(), sorted.end());
  const double at = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (at - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

double TimingSamples::mean_mhz() const { return mean(sm_mhz); }
double TimingSamples::mean_watts() const { return mean(watts); }

void TimingSamples::add(const TimingSamples& other) {
  us.insert(us.end(), other.us.begin(), other.us.end());
  sm_mhz.insert(sm_mhz.end(), other.sm_mhz.begin(), other.sm_mhz.end());
  watts.insert(watts.end(), other.watts.begin(), other.watts.end());
}

OwnedGraph GraphTimer::record(const std::function<void(cudaStream_t)>& call) const {
  call(stream_.get());
  stream_.wait();
  return OwnedGraph(stream_.get(), [&](cudaStream_t s) {
    for (int i = 0; i < protocol_.calls; ++i) call(s);
  });
}

double GraphTimer::replay_seconds(const OwnedGraph& graph) const {
  Event start, end;
  graph.launch(stream_.get());
  start.record(stream_.get());
  for (int i = 0; i < 3; ++i) graph.launch(stream_.get());
  end.record(stream_.get());
  end.wait();
  return std::max(end.ms_since(start) * 1e-3 / 3, 1e-6);
}

// Neighbouring samples share an event, so that nothing but the replays lies on the stream. The
// clock is read while replays are waiting there; a reading that may have come after the last one is
// dropped, as it would be that of an idle GPU.
void GraphTimer::replay_timed(const OwnedGraph& graph, int replays, TimingSamples& samples,
                              bool sample_clock) const {
  std::vector<Event> events(static_cast<std::size_t>(replays) + 1);
  auto last_reading = Clock::now();
  bool all_queued = false;
  const auto read_clock = [&] {
    if (!sample_clock || seconds_since(last_reading) < 0.01) return;
    const double mhz = nvml_.sm_clock_mhz(), watts = nvml_.power_watts();
    last_reading = Clock::now();
    if (all_queued && events.back().done()) return;
    if (mhz > 0) samples.sm_mhz.push_back(mhz);
    if (watts > 0) samples.watts.push_back(watts);
  };
  events[0].record(stream_.get());
  for (std::size_t i = 1; i < events.size(); ++i) {
    graph.launch(stream_.get());
    events[i].record(stream_.get());
    if (i % 64 == 0) read_clock();
  }
  all_queued = true;
  while (!events.back().done()) {
    read_clock();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  for (std::size_t i = 1; i < events.size(); ++i) {
    samples.us.push_back(events[i].ms_since(events[i - 1]) * 1e3 / protocol_.calls);
  }
}

TimingSamples GraphTimer::burst(const OwnedGraph& graph) const {
  const double one = replay_seconds(graph);
  const int replays = std::clamp(static_cast<int>(std::ceil(protocol_.burst_s / one)), 3, 500);
  std::this_thread::sleep_for(std::chrono::duration<double>(protocol_.idle_s));
  graph.launch(stream_.get());
  TimingSamples samples;
  replay_timed(graph, replays, samples, false);
  return samples;
}

TimingSamples GraphTimer::sustained(const OwnedGraph& graph) const {
  const double one = replay_seconds(graph);
  // Two chunks of about 20 ms are always on the stream, so that it never runs dry.
  const int chunk = std::max(1, static_cast<int>(0.02 / one));
  const auto start = Clock::now();
  Event marks[2];
  int next = 0;
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < chunk; ++k) graph.launch(stream_.get());
    marks[i].record(stream_.get());
  }
  while (seconds_since(start) < protocol_.load_s) {
    marks[next].wait();
    for (int k = 0; k < chunk; ++k) graph.launch(stream_.get());
    marks[next].record(stream_.get());
    next ^= 1;
  }
  const int replays = std::clamp(static_cast<int>(protocol_.sustained_s / one), 3, 20000);
  TimingSamples samples;
  replay_timed(graph, replays, samples, true);
  return samples;
}

}  // namespace snapmla::gpu
