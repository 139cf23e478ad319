#include "backends/cuda/cuda_backend.h"

#include <cuda_runtime.h>

#include "backends/cuda/device_memory.h"
#include "backends/cuda/launch.h"
#include "backends/cuda/model/model_ops.h"
#include "backends/cuda/study.h"
#include "snapmla/cuda.h"

namespace snapmla::cuda {
namespace {

// The stream of a backend. Not the default stream: it must not wait for, nor hold up, the work of
// the program around the library.
class OwnStream {
 public:
  OwnStream() {
    require_device();
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    stream_ = stream;
  }
  ~OwnStream() { cudaStreamDestroy(static_cast<cudaStream_t>(stream_)); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  Stream get() const { return stream_; }

 private:
  Stream stream_ = nullptr;
};

class CudaBackend final : public ops::OpSet {
 public:
  CudaBackend() : memory_(stream_.get()) {}

  const char* name() const override { return "cuda"; }
  Memory& memory() override { return memory_; }

  void begin_step() override { in_step_ = true; }
  void end_step() noexcept override {
    in_step_ = false;
    planned_lengths_ = nullptr;
  }

  void quantize_q(const QuantizeQArgs& args) override { cuda::quantize_q(args, stream_.get()); }
  void append_kv(const AppendKvArgs& args) override { cuda::append_kv(args, stream_.get()); }
  void fetch_dequant(const FetchDequantArgs& args) override {
    cuda::fetch_dequant(args, stream_.get());
  }
  void round_latents(const RoundLatentsArgs& args) override {
    cuda::round_latents(args, stream_.get());
  }
  void mla_decode(const MlaDecodeArgs& args) override;
  void mla_prefill(const ops::MlaPrefillArgs& args) override {
    cuda::mla_prefill(args, stream_.get());
  }
  void embed(const ops::EmbedArgs& args) override { cuda::embed(args, stream_.get()); }
  void linear(const ops::LinearArgs& args) override { cuda::linear(args, stream_.get()); }
  void head_linear(const ops::HeadLinearArgs& args) override {
    cuda::head_linear(args, stream_.get());
  }
  void rms_norm(const ops::RmsNormArgs& args) override { cuda::rms_norm(args, stream_.get()); }
  void rope(const ops::RopeArgs& args) override { cuda::rope(args, stream_.get()); }
  void swiglu(const ops::SwigluArgs& args) override { cuda::swiglu(args, stream_.get()); }
  void copy_rows(const ops::CopyRowsArgs& args) override { cuda::copy_rows(args, stream_.get()); }
  void add(const TensorView& x, const TensorView& y) override { cuda::add(x, y, stream_.get()); }
  void moe_route(const ops::MoeRouteArgs& args) override { cuda::moe_route(args, stream_.get()); }
  void moe_ffn(const ops::MoeFfnArgs& args) override { experts_.run(args, memory_, stream_.get()); }
  void study_append(const ops::StudyAppendArgs& args) override {
    cuda::study_append(args, stream_.get());
  }
  void study_decode(const ops::StudyDecodeArgs& args) override {
    cuda::study_decode(args, stream_.get());
  }

 private:
  OwnStream stream_;  // first: everything below uses it to its end
  DeviceMemory memory_;
  Buffer workspace_;
  bool in_step_ = false;
  const void* planned_lengths_ = nullptr;  // cache_seqlens that the workspace's plan is for
  DecodeShape planned_;
  ExpertRunner experts_;
};

void CudaBackend::mla_decode(const MlaDecodeArgs& args) {
  if (args.cache.format == KvCacheFormat::kF32) {
    cuda::mla_decode_f32(args, stream_.get());
    return;
  }
  DecodeShape shape;
  shape.batch = args.q_latent.dim(0);
  shape.seqlen_q = args.q_latent.dim(1);
  shape.heads_q = args.q_latent.dim(2);
  shape.max_pages = args.block_table.dim(1);
  shape.format = args.cache.format;
  // A number of splits cannot be had here; asking for one gives the other plan, so that a caller
  // can see what a different split changes.
  shape.deterministic = args.num_splits == 0;
  const std::int64_t bytes = decode_workspace_bytes(shape);
  if (bytes > workspace_.bytes()) planned_lengths_ = nullptr;
  workspace_.grow(memory_, bytes);
  const Workspace workspace{workspace_.data(), workspace_.bytes()};
  // Inside a step the plan of the first layer serves all.
  if (planned_lengths_ == nullptr || planned_lengths_ != args.cache_seqlens.raw() ||
      !(shape == planned_)) {
    plan_decode(shape, args.cache_seqlens, workspace, stream_.get());
    planned_lengths_ = in_step_ ? args.cache_seqlens.raw() : nullptr;
    planned_ = shape;
  }
  cuda::mla_decode(args, shape, workspace, stream_.get());
}

}  // namespace

std::unique_ptr<ops::OpSet> make_cuda_backend() { return std::make_unique<CudaBackend>(); }

}  // namespace snapmla::cuda
