// The other operations of include/snapmla/cuda.h, and the backend, in a build without CUDA.
#include "backends/cuda/cuda_backend.h"
#include "backends/cuda/no_cuda/no_cuda.h"
#include "snapmla/cuda.h"

namespace snapmla::cuda {

const char* unavailable_reason() noexcept {
  return "this build has no CUDA kernels (configured without nvcc, or with SNAPMLA_CUDA=OFF)";
}

void quantize_q(const QuantizeQArgs&, Stream, const RotaryFusion&) { not_built("quantize_q"); }
void append_kv(const AppendKvArgs&, Stream, const RotaryFusion&, const NormFusion&) {
  not_built("append_kv");
}
void fetch_dequant(const FetchDequantArgs&, Stream) { not_built("fetch_dequant"); }
void round_latents(const RoundLatentsArgs&, Stream) { not_built("round_latents"); }

std::unique_ptr<ops::OpSet> make_cuda_backend() { not_built("the backend"); }

}  // namespace snapmla::cuda
