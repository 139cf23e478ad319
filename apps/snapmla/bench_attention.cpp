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

}  // namespace

void register_attention(CLI::App& bench, int& status) {
  auto f = std::make_shared<Flags>();
  CLI::App* command = bench.add_subcommand(
      "attention",
      "Decode attention over a random cache. Lists make a sweep: --heads 8,16 --context 1024,8192");
  const auto list = [&](const char* name, auto& values, const char* help, int low, int high) {
    command->add_option(name, values, help)
        ->delimiter(',')
        ->check(integer_in(low, high))
        ->capture_default_str();
  };
  list("--heads", f->heads, "Query heads", 1, kMaxHeadsQ);
  list("--seqlen-q", f->seqlen_q, "New tokens per request", 1, kMaxSeqlenQ);
  list("-b,--batch", f->batch, "Requests", 1, 65536);
  list("-c,--context", f->context, "Tokens in the cache per request, the new ones included", 1,
       1 << 24);
  command->add_option("--kv-cache", f->kv_cache, "Formats of the latent cache")
      ->delimiter(',')
      ->check(one_of({"fp8", "bf16"}))
      ->capture_default_str();
  command->add_option("--device", f->device, "cpu, ref (the slow specification), or cuda")
      ->capture_default_str();
  command->add_option("-t,--threads", f->threads, "Threads; default: all that the process may use")
      ->check(integer_in(0, 4096));
  command->add_option("-r,--repetitions", f->repetitions, "Timed runs per shape, at least")
      ->check(integer_in(1, 1000000))
      ->capture_default_str();
  command->add_option("--min-time", f->min_time, "Seconds of timed runs per shape, at least")
      ->check(number_in([](double x) { return x >= 0 && x <= 3600; }, "0 to 3600"))
      ->capture_default_str();
  command->add_option("-o,--output", f->output, "table, json, csv or md")
      ->check(one_of({"table", "json", "csv", "md"}))
      ->capture_default_str();
  auto on_cuda = std::make_shared<CudaAttention>();
  on_cuda->add_options(*command);
  command->callback([f, on_cuda, &status] {
    // A GPU is timed in another way, in graphs and with all caches in turn, and has its own report.
    status = f->device == "cuda"
                 ? on_cuda->run(f->heads, f->seqlen_q, f->batch, f->context, f->kv_cache,
                                describe_run()["command"].get<std::string>())
                 : run(*f);
  });
}

}  // namespace snapmla::app::bench
