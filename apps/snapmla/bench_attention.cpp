// snapmla bench attention: decode attention over random caches in shuffled pages. The output of
// every timed shape is checked in the same run, on sampled rows.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>

#include "base/check.h"
#include "bench_cuda.h"
#include "bench_device.h"
#include "bench_problem.h"
#include "commands.h"
#include "engine/backend_factory.h"

namespace snapmla::app::bench {
namespace {

struct Flags {
  std::vector<int> heads = {8, 16}, seqlen_q = {1}, batch = {1}, context = {1024, 8192, 32768};
  std::vector<std::string> kv_cache = {"fp8", "bf16"};
  std::string device = "cpu", output = "table";
  int threads = 0, repetitions = 10;
  double min_time = 0.5;
};

std::vector<AttentionCase> cases(const Flags& f) {
  std::vector<AttentionCase> list;
  for (const std::string& kv : f.kv_cache)
    for (int s : f.seqlen_q)
      for (int b : f.batch)
        for (int h : f.heads)
          for (int n : f.context) {
            if (n < s) {
              throw Error(ErrorCode::kInvalidArgument,
                          str("context: got ", n, " with seqlen-q ", s,
                              ", accepted is at least seqlen-q (it counts the new tokens)"));
            }
            list.push_back({parse_format(kv), h, s, b, n});
          }
  return list;
}

// Seconds of each of at least `repetitions` runs and `min_time` seconds, after a warm-up.
std::vector<double> sample(AttentionRun& run, const Flags& f, std::int64_t copies) {
  std::int64_t copy = 0;
  const auto once = [&] { return run.time_once(copy++ % copies); };
  double total = 0;
  for (int i = 0; i < 2 || (total < 0.2 * f.min_time && i < 1000); ++i) total += once();
  std::vector<double> samples;
  for (total = 0; static_cast<int>(samples.size()) < f.repetitions || total < f.min_time;) {
    samples.push_back(once());
    total += samples.back();
  }
  return samples;
}

nlohmann::ordered_json measure(AttentionDevice& device, const AttentionCase& c, const Flags& f) {
  AttentionData data = make_attention_data(c);
  const std::unique_ptr<AttentionRun> run = device.prepare(c, data);
  const std::vector<double> samples = sample(*run, f, data.copies);
  const double error = verify(c, data, run->result(), device.name() == "ref");
  const Spread s = spread(samples);
  return {{"device", device.name()},
          {"kv_cache", to_string(c.format)},
          {"heads", c.heads},
          {"seqlen_q", c.seqlen_q},
          {"batch", c.batch},
          {"context", c.context},
          {"ms", s.median * 1e3},
          {"ms_min", *std::min_element(samples.begin(), samples.end()) * 1e3},
          {"ms_p20", s.p20 * 1e3},
          {"ms_p80", s.p80 * 1e3},
          {"tok/s", static_cast<double>(c.batch * c.seqlen_q) / s.median},
          {"GFLOP/s", c.flops() / s.median / 1e9},
          {"GB/s", c.cache_bytes() / s.median / 1e9},
          {"error", error},
          {"samples", samples.size()}};
}

// Shares of the limits, and of the one that binds (the roofline): of the median run and of the
// fastest, which other work on the machine disturbs least.
void add_shares(nlohmann::ordered_json& row, const Limits& limits) {
  const double fma = 100 * row["GFLOP/s"].get<double>() / limits.gflops;
  const double memory = 100 * row["GB/s"].get<double>() / limits.gbytes_per_second;
  row["fma%"] = fma;
  row["mem%"] = memory;
  row["bound"] = fma >= memory ? "fma" : "memory";
  row["bound%"] = std::max(fma, memory);
  row["best%"] = std::max(fma, memory) * row["ms"].get<double>() / row["ms_min"].get<double>();
}

int run(const Flags& f) {
  const std::vector<AttentionCase> list = cases(f);
  const std::unique_ptr<AttentionDevice> device = make_attention_device(f.device, f.threads);
  Report report;
  report.about = describe_run();
  report.about["machine"] = device->describe();
  report.columns = {{"device", ""},     {"kv_cache", ""},   {"heads", ""},     {"seqlen_q", ""},
                    {"batch", ""},      {"context", ""},    {"ms", "%.3f"},    {"ms_min", "%.3f"},
                    {"ms_p20", "%.3f"}, {"ms_p80", "%.3f"}, {"tok/s", "%.1f"}, {"GFLOP/s", "%.1f"},
                    {"fma%", "%.0f"},   {"GB/s", "%.2f"},   {"mem%", "%.0f"},  {"bound", ""},
                    {"bound%", "%.0f"}, {"best%", "%.0f"},  {"error", "%.1e"}};
  Limits limits = device->measure_limits();
  for (const AttentionCase& c : list) {
    if (isatty(STDERR_FILENO)) {
      std::cerr << "\r" << report.rows.size() + 1 << "/" << list.size() << " " << std::flush;
    }
    report.rows.push_back(measure(*device, c, f));
    limits.keep_best(device->measure_limits());
  }
  if (isatty(STDERR_FILENO)) std::cerr << "\r               \r";
  for (nlohmann::ordered_json& row : report.rows) add_shares(row, limits);
  report.about["limits"] = {{"fma_gflops", limits.gflops},
                            {"memory_gbytes_per_s", limits.gbytes_per_second}};
  char note[200];
  std::snprintf(note, sizeof note,
                "limits measured in this run: %.1f GFLOP/s of f32 multiply-adds, %.1f GB/s of "
                "reads; %d threads",
                limits.gflops, limits.gbytes_per_second, device->threads());
  report.about["note"] = note;
  std::cout << to_text(report, parse_output(f.output));
  return 0;
}

// An option that the device has no use for is a mistake, not something to pass over.
void check_options(const CLI::App& command, const std::vector<CLI::Option*>& host_only,
                   const std::string& given, const std::string& device) {
  const auto refuse = [&](const CLI::Option* option, const std::string& accepted) {
    const std::string meaning = given == device ? "" : " (here " + device + ")";
    throw CLI::ValidationError(option->get_name(),
                               "got --device " + given + meaning + ", accepted " + accepted);
  };
  for (const CLI::Option* option : command.get_options()) {
    if (option->count() > 0 && option->get_group() == CudaAttention::kGroup && given != "cuda") {
      refuse(option, "only with --device cuda");
    }
  }
  if (device != "cuda") return;
  for (const CLI::Option* option : host_only) {
    if (option->count() > 0) refuse(option, "only with --device cpu or ref");
  }
}

// The GPU bench measures the tensor core kernels; an F32 cache has none.
void check_formats(const std::vector<std::string>& formats, const std::string& device) {
  if (device == "cuda" && std::find(formats.begin(), formats.end(), "f32") != formats.end()) {
    throw CLI::ValidationError("--kv-cache",
                               "got 'f32', accepted with --device cuda are fp8, bf16 "
                               "(an f32 cache has no tensor core kernel to measure)");
  }
}

}  // namespace

void register_attention(CLI::App& bench, int& status) {
  auto f = std::make_shared<Flags>();
  CLI::App* command = bench.add_subcommand("attention",
                                           "Decode attention over a random cache.\nLists make a "
                                           "sweep: --heads 8,16 --context 1024,8192");
  using bench_cli::with_default;
  const auto list = [&](const char* name, auto& values, const char* help, int low, int high) {
    command->add_option(name, values, with_default(help, values))
        ->type_name("N,...")
        ->delimiter(',')
        ->check(integer_in(low, high));
  };
  list("--heads", f->heads, "Query heads", 1, kMaxHeadsQ);
  list("--seqlen-q", f->seqlen_q, "New tokens per request", 1, kMaxSeqlenQ);
  list("-b,--batch", f->batch, "Requests", 1, 65536);
  list("-c,--context", f->context, "Tokens in the cache per request, the new ones included\n", 1,
       1 << 24);
  add_kv_cache(*command, f->kv_cache, " (not on cuda)");
  add_device(*command, f->device);
  std::vector<CLI::Option*> host_only;
  host_only.push_back(add_threads(*command, f->threads));
  host_only.push_back(
      command
          ->add_option("-r,--repetitions", f->repetitions,
                       with_default("Timed runs per shape, at least", f->repetitions))
          ->type_name("N")
          ->check(integer_in(1, 1000000)));
  host_only.push_back(
      command
          ->add_option("--min-time", f->min_time,
                       with_default("Timed runs per shape take at least this", f->min_time))
          ->type_name("SECONDS")
          ->check(number_in([](double x) { return x >= 0 && x <= 3600; }, "0 to 3600")));
  host_only.push_back(add_output(*command, f->output));
  for (CLI::Option* option : host_only) option->group("Only with --device cpu or ref");
  auto on_cuda = std::make_shared<CudaAttention>();
  on_cuda->add_options(*command);
  command->footer(
      "Examples:\n"
      "  snapmla bench attention --heads 8,16 --context 1024,8192\n"
      "  snapmla bench attention --kv-cache fp8 -b 4 --seqlen-q 2 -t 1 -o json > report.json\n"
      "  snapmla bench attention --device cuda --preset quick --json report.json");
  command->callback([f, on_cuda, host_only, command, &status] {
    const std::string device = engine::resolve_backend(f->device);
    check_options(*command, host_only, f->device, device);
    check_formats(f->kv_cache, device);
    // A GPU is timed in another way, in graphs and with all caches in turn, and has its own report.
    if (device == "cuda") {
      status = on_cuda->run(f->heads, f->seqlen_q, f->batch, f->context, f->kv_cache,
                            describe_run()["command"].get<std::string>());
    } else {
      f->device = device;
      status = run(*f);
    }
  });
}

}  // namespace snapmla::app::bench
