// Times decode over the FP8 and the BF16 cache in one run, interleaved, and verifies the outputs of
// every timed shape against fp64.
//
// FP8 and BF16 times are those of mla_decode: the split kernel and the combine. quantize_q,
// append_kv and plan are timed beside it. Protocol: graph_timer.h. Data: normal deviates; pages
// shuffled over the whole batch. TFLOP/s counts 2 * 1088 * rows * tokens, TB/s 644 (FP8) or 1152
// (BF16) bytes per cached token. "roof" is the share of the least time that the nominal tensor rate
// at the largest SM clock, or the nominal memory bandwidth, allows.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "graph_timer.h"
#include "snapmla/kv_cache.h"

namespace snapmla::gpu {

struct AttentionBenchShape {
  std::int64_t heads = 128, seqlen_q = 1, batch = 1;
  std::int32_t context = 0;  // 0: ragged, log-uniform from 1k to 128k
};

// "issue": every shape of the project's performance table; "big", "ragged", "small": its parts;
// "quick": one shape for each number of rows. Throws kInvalidArgument for another name.
std::vector<AttentionBenchShape> preset_shapes(const std::string& name);
// Every combination; a context of 0 is ragged.
std::vector<AttentionBenchShape> sweep_shapes(const std::vector<std::int64_t>& heads,
                                              const std::vector<std::int64_t>& seqlens_q,
                                              const std::vector<std::int64_t>& batches,
                                              const std::vector<std::int32_t>& contexts);
// Lengths of the requests of a shape; ragged ones are the same in every run.
std::vector<std::int32_t> request_lengths(const AttentionBenchShape& shape);

struct AttentionBenchOptions {
  std::vector<AttentionBenchShape> shapes;
  std::vector<KvCacheFormat> formats = {KvCacheFormat::kFp8, KvCacheFormat::kBf16};
  int p_block = 128;
  bool deterministic = false;
  int rounds = 1;          // burst and sustained of every format, in turn, so many times
  int verified_rows = 24;  // sampled rows per shape and format
  bool extras = true;      // time quantize_q, append_kv and plan too
  TimingProtocol protocol;
  std::string command;    // goes into the report
  std::string json, csv;  // files; empty: not written
};

// Prints the table while measuring; returns whether every output was verified.
bool run_attention_bench(const AttentionBenchOptions& options, std::ostream& out);

}  // namespace snapmla::gpu
