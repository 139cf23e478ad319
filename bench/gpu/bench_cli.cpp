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
  CLI::App* command =
      bench.add_subcommand("accuracy", "cuda: error of decode against fp64, by data and length");
  using bench_cli::with_default;
  command
      ->add_option("-c,--context", options->contexts,
                   with_default("Tokens in the cache", options->contexts))
      ->type_name("N,...")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 24).description(""));
  command->add_option("--heads", options->heads, with_default("Query heads", options->heads))
      ->type_name("N")
      ->check(CLI::Range(1, kMaxHeadsQ).description(""));
  command->add_option("--seed", options->seed, with_default("Seed of the data", options->seed))
      ->type_name("N");
  command
      ->add_option("--bound", options->bound,
                   with_default("Largest accepted ratio of the kernel's error to that\n"
                                "of the scheme with the tensor core's sums",
                                options->bound))
      ->type_name("RATIO");
  command
      ->add_option("--arithmetic", options->arithmetic,
                   with_default("Largest accepted distance, relative, between the kernel's output\n"
                                "and that of the scheme in exact arithmetic",
                                options->arithmetic))
      ->type_name("DISTANCE")
      ->check(CLI::PositiveNumber.description(""));
  command
      ->add_option("--per-tensor", options->per_tensor_folder,
                   "Also write each case, quantised with one scale per tensor, and its\n"
                   "exact results to this folder, to measure other kernels on the same\n"
                   "inputs (format: bench/gpu/accuracy_bench.h)")
      ->type_name("DIR")
      ->check(CLI::ExistingDirectory.description(""));
  command->add_option("--json", options->json, "Write the report to this file")->type_name("FILE");
  command->add_option("--markdown", options->markdown, "Write the table to this file")
      ->type_name("FILE");
  command->callback([options, &status] {
    require_gpu();
    status = run_accuracy_bench(*options, std::cout) ? 0 : 1;
    if (status != 0) {
      std::cerr << "snapmla: error: a kernel error is out of bounds; the table marks it\n";
    }
  });
}

}  // namespace snapmla::gpu
