// The decode operations of a build without their kernels.
#include "backends/cuda/no_cuda/no_cuda.h"
#include "snapmla/cuda.h"

namespace snapmla::cuda {

std::int64_t decode_workspace_bytes(const DecodeShape&) { not_built("decode_workspace_bytes"); }

void plan_decode(const DecodeShape&, const TensorView&, const Workspace&, Stream) {
  not_built("plan_decode");
}

void mla_decode(const MlaDecodeArgs&, const DecodeShape&, const Workspace&, Stream) {
  not_built("mla_decode");
}

}  // namespace snapmla::cuda
