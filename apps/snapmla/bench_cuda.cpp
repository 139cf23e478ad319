#include "bench_cuda.h"

#include "gpu/attention_options.h"

#ifdef SNAPMLA_CUDA_BENCH
#include "gpu/bench_cli.h"
#include "gpu/machine.h"
#else
#include "snapmla/cuda.h"
#include "snapmla/error.h"
#endif

namespace snapmla::app::bench {

struct CudaAttention::Impl {
  gpu::AttentionCliFlags flags;
};

#ifdef SNAPMLA_CUDA_BENCH

int CudaAttention::run(const std::vector<int>& heads, const std::vector<int>& seqlen_q,
                       const std::vector<int>& batch, const std::vector<int>& context,
                       const std::vector<std::string>& kv_cache, const std::string& command) {
  gpu::AttentionSweep sweep;
  sweep.heads.assign(heads.begin(), heads.end());
  sweep.seqlen_q.assign(seqlen_q.begin(), seqlen_q.end());
  sweep.batch.assign(batch.begin(), batch.end());
  sweep.context.assign(context.begin(), context.end());
  sweep.kv_cache = kv_cache;
  return gpu::run_attention_cli(sweep, impl_->flags, command);
}

void register_accuracy(CLI::App& bench, int& status) {
  gpu::register_accuracy(bench, status);
  bench.get_subcommand("accuracy")
      ->footer(
          "Examples:\n"
          "  snapmla bench accuracy\n"
          "  snapmla bench accuracy --heads 16 -c 1024,32768 --markdown accuracy.md");
}

nlohmann::ordered_json describe_gpu() {
  try {
    return gpu::machine_report(gpu::Nvml(0));
  } catch (const std::exception& e) {
    return {{"error", e.what()}};  // never instead of the report that it would stand in
  }
}

#else

int CudaAttention::run(const std::vector<int>&, const std::vector<int>&, const std::vector<int>&,
                       const std::vector<int>&, const std::vector<std::string>&,
                       const std::string&) {
  throw Error(ErrorCode::kUnsupported,
              std::string("device: got cuda, but ") + cuda::unavailable_reason());
}

void register_accuracy(CLI::App&, int&) {}

nlohmann::ordered_json describe_gpu() { return nullptr; }

#endif

CudaAttention::CudaAttention() : impl_(std::make_unique<Impl>()) {}
CudaAttention::~CudaAttention() = default;

void CudaAttention::add_options(CLI::App& command) {
  gpu::add_attention_options(command, impl_->flags, kGroup);
}

}  // namespace snapmla::app::bench
