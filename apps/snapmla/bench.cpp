// snapmla bench: the command, and the descriptions that every report carries.
#include "bench.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <fstream>
#include <thread>

#include "backends/cpu/kernels.h"
#include "base/check.h"
#include "bench_cuda.h"
#include "commands.h"

namespace snapmla::app {
namespace bench {

Spread spread(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const auto at = [&](double q) {
    const double where = q * static_cast<double>(samples.size() - 1);
    const auto below = static_cast<std::size_t>(where);
    const std::size_t above = std::min(below + 1, samples.size() - 1);
    return samples[below] + (where - std::floor(where)) * (samples[above] - samples[below]);
  };
  return {at(0.5), at(0.2), at(0.8)};
}

int thread_count(int requested) {
  if (requested > 0) return requested;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

nlohmann::ordered_json describe_machine(int threads) {
  std::string model = "unknown", line;
  std::ifstream info("/proc/cpuinfo");
  while (std::getline(info, line)) {
    const std::size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      model = line.substr(colon + 2);
      break;
    }
  }
  double load[3] = {0, 0, 0};
  if (getloadavg(load, 3) < 3) load[0] = -1;
  return {{"cpu", model},
          {"cores", std::thread::hardware_concurrency()},
          {"threads", threads},
          {"simd", cpu::simd_target()},
          {"load_average_1min", load[0]},
          {"compiler", __VERSION__}};
}

nlohmann::ordered_json describe_run() {
  std::string command = "snapmla", word;
  std::ifstream arguments("/proc/self/cmdline");
  std::getline(arguments, word, '\0');  // the program's path says nothing
  while (std::getline(arguments, word, '\0')) command += " " + word;
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  char date[32];
  std::tm utc{};
  gmtime_r(&now, &utc);
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return {{"command", command}, {"version", SNAPMLA_VERSION}, {"date", date}};
}

CLI::Option* add_kv_cache(CLI::App& command, std::vector<std::string>& formats,
                          const std::string& note) {
  const std::string help = "Formats of the latent cache: fp8, bf16, f32" + note;
  return command.add_option("--kv-cache", formats, bench_cli::with_default(help + "\n", formats))
      ->type_name("FORMAT,...")
      ->delimiter(',')
      ->check(one_of({"fp8", "bf16", "f32"}));
}

CLI::Option* add_device(CLI::App& command, std::string& device) {
  const std::string help = "auto, cpu, cuda, or ref, the slow specification";
  return command.add_option("--device", device, bench_cli::with_default(help + "\n", device))
      ->type_name("NAME")
      ->check(one_of({"auto", "cpu", "cuda", "ref"}));
}

CLI::Option* add_threads(CLI::App& command, int& threads) {
  return command
      .add_option("-t,--threads", threads, "Threads (default: all that the process may use)")
      ->type_name("N")
      ->check(integer_in(0, 4096));
}

CLI::Option* add_output(CLI::App& command, std::string& output) {
  return command
      .add_option("-o,--output", output, bench_cli::with_default("table, json, csv or md", output))
      ->type_name("FORM")
      ->check(one_of({"table", "json", "csv", "md"}));
}

}  // namespace bench

void register_bench(CLI::App& app, int& status) {
  CLI::App* command =
      app.add_subcommand("bench", "Measure decode attention, or text generation with a model");
  command->require_subcommand(1);
  command->footer(
      "Examples:\n"
      "  snapmla bench attention --heads 8,16 --context 1024,8192\n"
      "  snapmla bench generate -p 512 -n 128 --kv-cache fp8,bf16\n"
      "'snapmla bench COMMAND --help' describes a command.");
  bench::register_attention(*command, status);
  bench::register_generate(*command, status);
  bench::register_accuracy(*command, status);
}

}  // namespace snapmla::app
