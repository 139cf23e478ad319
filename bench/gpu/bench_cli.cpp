#include "gpu/bench_cli.h"

#include <iostream>

#include "snapmla/cuda.h"
#include "snapmla/error.h"

namespace snapmla::gpu {
namespace {

void require_gpu() {
  const char* reason = cuda::unavailable_reason();
  if (reason[0] != '\0') {
    throw Error(ErrorCode::kUnsupported, std::string("device: got cuda, but ") + reason);
  }
}

KvCacheFormat parse_format(const std::string& text) {
  if (text == "fp8") return KvCacheFormat::kFp8;
  if (text == "bf16") return KvCacheFormat::kBf16;
  throw Error(ErrorCode::kInvalidArgument,
              "kv-cache: got '" + text + "', accepted on cuda are fp8 and bf16");
}

}  // namespace

void add_attention_options(CLI::App& command, AttentionCliFlags& flags) {
  command
      .add_option(
          "--preset", flags.preset,
          "cuda: a list of shapes instead of a sweep: issue (all of the performance table), "
          "big, ragged, small, quick")
      ->check(CLI::IsMember({"issue", "big", "ragged", "small", "quick"}));
  command.add_flag("--ragged", flags.ragged,
                   "cuda: a ragged batch beside the contexts, log-uniform from 1k to 128k tokens");
  command.add_option("--p-block", flags.p_block, "cuda: tokens per scale of P, FP8 cache")
      ->check(CLI::IsMember({64, 128}))
      ->capture_default_str();
  command.add_flag("--deterministic", flags.deterministic,
                   "cuda: split every request by its own length alone");
  command.add_flag("--no-extras", flags.no_extras,
                   "cuda: do not time quantize_q, append_kv and plan beside decode");
  command
      .add_option("--rounds", flags.rounds, "cuda: burst and sustained of every cache, so often")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command.add_option("--idle", flags.idle_s, "cuda: idle seconds before a burst")
      ->check(CLI::Range(0.0, 60.0))
      ->capture_default_str();
  command.add_option("--load", flags.load_s, "cuda: seconds of load before a sustained timing")
      ->check(CLI::Range(0.0, 600.0))
      ->capture_default_str();
  command.add_option("--sustained", flags.sustained_s, "cuda: seconds of a sustained timing")
      ->check(CLI::Range(0.001, 600.0))
      ->capture_default_str();
  command.add_option("--json", flags.json, "cuda: write the report to this file");
  command.add_option("--csv", flags.csv, "cuda: write the table to this file");
}

int run_attention_cli(const AttentionSweep& sweep, const AttentionCliFlags& flags,
                      const std::string& command) {
  require_gpu();
  AttentionBenchOptions options;
  if (!flags.preset.empty()) {
    options.shapes = preset_shapes(flags.preset);
  } else {
    std::vector<std::int32_t> contexts = sweep.context;
    if (flags.ragged) contexts.push_back(0);
    options.shapes = sweep_shapes(sweep.heads, sweep.seqlen_q, sweep.batch, contexts);
  }
  options.formats.clear();
  for (const std::string& text : sweep.kv_cache) options.formats.push_back(parse_format(text));
  options.p_block = flags.p_block;
  options.deterministic = flags.deterministic;
  options.extras = !flags.no_extras;
  options.rounds = flags.rounds;
  options.protocol.idle_s = flags.idle_s;
  options.protocol.load_s = flags.load_s;
  options.protocol.sustained_s = flags.sustained_s;
  options.command = command;
  options.json = flags.json;
  options.csv = flags.csv;
  if (run_attention_bench(options, std::cout)) return 0;
  std::cerr << "snapmla: error: an output was wrong; the table marks it\n";
  return 1;
}

void register_accuracy(CLI::App& bench, int& status) {
  auto options = std::make_shared<AccuracyOptions>();
  CLI::App* command = bench.add_subcommand(
      "accuracy", "cuda: error of decode against fp64, by distribution and context");
  command->add_option("-c,--context", options->contexts, "Tokens in the cache")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command->add_option("--heads", options->heads, "Query heads")
      ->check(CLI::Range(1, kMaxHeadsQ))
      ->capture_default_str();
  command->add_option("--seed", options->seed, "Seed of the data")->capture_default_str();
  command
      ->add_option("--bound", options->bound,
                   "Largest accepted ratio of the kernel's error to the emulation's")
      ->capture_default_str();
  command->add_option("--json", options->json, "Write the report to this file");
  command->add_option("--markdown", options->markdown, "Write the table to this file");
  command->callback([options, &status] {
    require_gpu();
    status = run_accuracy_bench(*options, std::cout) ? 0 : 1;
    if (status != 0) {
      std::cerr << "snapmla: error: a kernel error is above the bound; the table marks it\n";
    }
  });
}

}  // namespace snapmla::gpu
