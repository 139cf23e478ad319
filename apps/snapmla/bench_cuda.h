// The CUDA side of snapmla bench: `attention --device cuda` and `accuracy`. In a build without CUDA
// there is no `accuracy`, and running `attention --device cuda` is an error that says so.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace snapmla::app::bench {

class CudaAttention {
 public:
  CudaAttention();
  ~CudaAttention();

  // Heading of its options in --help, and what tells them from the others.
  static constexpr const char* kGroup = "Only with --device cuda";
  void add_options(CLI::App& command);
  // Exit status. `command`: the command line, for the report.
  int run(const std::vector<int>& heads, const std::vector<int>& seqlen_q,
          const std::vector<int>& batch, const std::vector<int>& context,
          const std::vector<std::string>& kv_cache, const std::string& command);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

void register_accuracy(CLI::App& bench, int& status);

// Name, driver and sizes of GPU 0, which the engine uses, for reports; null without CUDA.
nlohmann::ordered_json describe_gpu();

}  // namespace snapmla::app::bench
