// bench_gpu: the GPU benches of `snapmla bench` as a program of their own, which needs nothing but
// a driver: it can be built here and run on a machine without the libraries that snapmla needs.
#include <exception>
#include <iostream>

#include "gpu/bench_cli.h"
#include "gpu/machine.h"
#include "snapmla/cuda.h"

int main(int argc, char** argv) {
  using namespace snapmla;
  CLI::App app("bench_gpu: measure decode attention on the GPU.");
  app.require_subcommand(1);
  int status = 0;
  std::string command = "bench_gpu";
  for (int i = 1; i < argc; ++i) command += std::string(" ") + argv[i];

  CLI::App* attention = app.add_subcommand(
      "attention", "Decode attention; lists make a sweep: --heads 16,128 --context 8192,32768");
  gpu::AttentionSweep sweep{{128}, {1}, {128}, {8192}, {"fp8", "bf16"}};
  gpu::AttentionCliFlags flags;
  attention->add_option("--heads", sweep.heads, "Query heads")
      ->delimiter(',')
      ->check(CLI::Range(1, kMaxHeadsQ))
      ->capture_default_str();
  attention->add_option("--seqlen-q", sweep.seqlen_q, "New tokens per request")
      ->delimiter(',')
      ->check(CLI::Range(1, kMaxSeqlenQ))
      ->capture_default_str();
  attention->add_option("-b,--batch", sweep.batch, "Requests")
      ->delimiter(',')
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  attention
      ->add_option("-c,--context", sweep.context,
                   "Tokens in the cache per request, the new ones included")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  attention->add_option("--kv-cache", sweep.kv_cache, "Formats of the latent cache")
      ->delimiter(',')
      ->check(CLI::IsMember({"fp8", "bf16"}))
      ->capture_default_str();
  gpu::add_attention_options(*attention, flags);
  attention->callback([&] { status = gpu::run_attention_cli(sweep, flags, command); });

  gpu::register_accuracy(app, status);

  CLI::App* machine = app.add_subcommand("machine", "Describe the GPU in one line of JSON");
  machine->callback([] {
    const gpu::Nvml nvml(0);
    std::cout << gpu::machine_report(nvml).dump() << '\n';
  });

  try {
    app.parse(argc, argv);
    return status;
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  } catch (const std::exception& e) {
    std::cerr << "bench_gpu: error: " << e.what() << '\n';
  }
  return 1;
}
