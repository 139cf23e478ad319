// The options of the GPU benches, for `snapmla bench` and for the stand-alone program bench_gpu.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gpu/accuracy_bench.h"
#include "gpu/attention_bench.h"
#include "gpu/attention_options.h"

namespace snapmla::gpu {

// The lists that a CPU bench has too; empty lists where a preset was given.
struct AttentionSweep {
  std::vector<std::int64_t> heads, seqlen_q, batch;
  std::vector<std::int32_t> context;
  std::vector<std::string> kv_cache;
};

// Exit status: 0, or 1 when an output was wrong. Throws kUnsupported without a usable GPU.
int run_attention_cli(const AttentionSweep& sweep, const AttentionCliFlags& flags,
                      const std::string& command);

// `accuracy`: the accuracy table.
void register_accuracy(CLI::App& bench, int& status);

}  // namespace snapmla::gpu
