// snapmla bench: what its parts share. bench_attention.cpp and bench_generate.cpp measure,
// bench_report.cpp writes, bench_machine.cpp measures the machine's own limits.
#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli_text.h"

namespace snapmla::app::bench {

// One column of a report: the key of a row's object, and how tables print it. `format` is printf's,
// for one double; empty: the value as it is (text, whole numbers).
struct Column {
  std::string key, format;
};

// What a bench has to say. `about` (command, machine, limits) and whole rows go to JSON; tables and
// CSV have the columns of every row.
struct Report {
  nlohmann::ordered_json about = nlohmann::ordered_json::object();
  std::vector<Column> columns;
  std::vector<nlohmann::ordered_json> rows;
};

enum class Output { kTable, kMarkdown, kCsv, kJson };
Output parse_output(const std::string& name);  // table, md, csv, json

std::string to_text(const Report& report, Output output);

// Median, lower and upper quintile of samples (linear between neighbours). samples must not be
// empty.
struct Spread {
  double median, p20, p80;
};
Spread spread(std::vector<double> samples);

// Threads that a bench with `requested` threads runs on (0: all that the process may use).
int thread_count(int requested);

// Processor, cores, threads, instruction set, load, compiler and versions.
nlohmann::ordered_json describe_machine(int threads);
// What was run and when: the command line, the version, the date.
nlohmann::ordered_json describe_run();

// The machine's limits as our own small kernels reach them: f32 multiply-adds from registers, and
// reading memory that no cache holds. On a shared machine they vary: keep the best of several.
struct Limits {
  double gflops = 0, gbytes_per_second = 0;
  void keep_best(const Limits& other) {
    gflops = std::max(gflops, other.gflops);
    gbytes_per_second = std::max(gbytes_per_second, other.gbytes_per_second);
  }
};
class LimitProbe {
 public:
  explicit LimitProbe(int threads);
  ~LimitProbe();
  Limits measure();  // about a tenth of a second

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Options that both benches have, with the same values in both.
CLI::Option* add_kv_cache(CLI::App& command, std::vector<std::string>& formats,
                          const std::string& note = "");
CLI::Option* add_device(CLI::App& command, std::string& device);
CLI::Option* add_threads(CLI::App& command, int& threads);
CLI::Option* add_output(CLI::App& command, std::string& output);

void register_attention(CLI::App& bench, int& status);
void register_generate(CLI::App& bench, int& status);

}  // namespace snapmla::app::bench
