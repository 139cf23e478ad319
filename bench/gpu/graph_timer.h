// How a GPU operation is timed: `calls` invocations in one CUDA graph, replayed
//   burst      after an idle pause and one warm replay, for about 25 ms: clocks are still high;
//   sustained  after half a second of the same load, for 0.3 s: power decides the clock, which is
//              sampled meanwhile.
// One sample is the time between two events around one replay, divided by the calls.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <vector>

#include "device.h"
#include "nvml.h"

namespace snapmla::gpu {

struct TimingProtocol {
  int calls = 10;  // per graph
  double idle_s = 0.7;
  double burst_s = 0.025;
  double load_s = 0.5;
  double sustained_s = 0.3;
};

// Microseconds of one call, and how the GPU ran meanwhile.
struct TimingSamples {
  std::vector<double> us;
  std::vector<double> sm_mhz, watts;  // sustained only
  double quantile(double q) const;    // of us; 0 when there are none
  double median() const { return quantile(0.5); }
  double mean_mhz() const;
  double mean_watts() const;
  void add(const TimingSamples& other);
};

class GraphTimer {
 public:
  GraphTimer(const TimingProtocol& protocol, const Nvml& nvml) : protocol_(protocol), nvml_(nvml) {}

  // The graph of protocol.calls invocations; runs `call` once before, outside the graph.
  OwnedGraph record(const std::function<void(cudaStream_t)>& call) const;
  TimingSamples burst(const OwnedGraph& graph) const;
  TimingSamples sustained(const OwnedGraph& graph) const;

 private:
  double replay_seconds(const OwnedGraph& graph) const;
  void replay_timed(const OwnedGraph& graph, int replays, TimingSamples& samples,
                    bool sample_clock) const;

  TimingProtocol protocol_;
  const Nvml& nvml_;
  OwnedStream stream_;
};

}  // namespace snapmla::gpu
