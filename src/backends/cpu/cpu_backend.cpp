#include "backends/cpu/cpu_backend.h"

#include <algorithm>

#include "backends/cpu/cpu_ops.h"
#include "backends/cpu/quantize_kernels.h"
#include "base/thread_pool.h"

namespace snapmla::cpu {
namespace {

class CpuBackend final : public ops::OpSet {
 public:
  explicit CpuBackend(int threads) : pool_(threads) {}
  const char* name() const override { return "cpu"; }
  void quantize_q(const QuantizeQArgs& args) override { cpu::quantize_q(pool_, args); }
  void append_kv(const AppendKvArgs& args) override { cpu::append_kv(pool_, args); }
  void fetch_dequant(const FetchDequantArgs& args) override { cpu::fetch_dequant(pool_, args); }
  void round_latents(const RoundLatentsArgs& a) override {
    constexpr std::int64_t kRows = ops::kFeedbackRows;
    const std::int64_t n = a.latent.dim(0);
    pool_.parallel_for((n + kRows - 1) / kRows, [&](std::int64_t i) {
      ops::round_latent_rows(a, i * kRows, std::min(n, (i + 1) * kRows), cpu::subtract_errors);
    });
  }
  void mla_decode(const MlaDecodeArgs& args) override { cpu::mla_decode(pool_, args); }
  void mla_prefill(const ops::MlaPrefillArgs& args) override { cpu::mla_prefill(pool_, args); }
  void embed(const ops::EmbedArgs& args) override { cpu::embed(pool_, args); }
  void linear(const ops::LinearArgs& args) override { cpu::linear(pool_, args); }
  void head_linear(const ops::HeadLinearArgs& args) override { cpu::head_linear(pool_, args); }
  void rms_norm(const ops::RmsNormArgs& args) override { cpu::rms_norm(pool_, args); }
  void rope(const ops::RopeArgs& args) override { cpu::rope(pool_, args); }
  void swiglu(const ops::SwigluArgs& args) override { cpu::swiglu(pool_, args); }
  void copy_rows(const ops::CopyRowsArgs& args) override { cpu::copy_rows(args); }
  void add(const TensorView& x, const TensorView& y) override { cpu::add(x, y); }
  void moe_route(const ops::MoeRouteArgs& args) override { cpu::moe_route(args); }
  void moe_ffn(const ops::MoeFfnArgs& args) override { cpu::moe_ffn(pool_, args); }
  void study_append(const ops::StudyAppendArgs& args) override { cpu::study_append(pool_, args); }
  void study_decode(const ops::StudyDecodeArgs& args) override { cpu::study_decode(pool_, args); }

 private:
  ThreadPool pool_;
};

}  // namespace

std::unique_ptr<ops::OpSet> make_cpu_backend(int threads) {
  return std::make_unique<CpuBackend>(threads);
}

}  // namespace snapmla::cpu
