// Launcher of the FP8 decode kernel: chooses the instance for the rows and the P block.
#pragma once

#include <cuda_runtime.h>

#include "backends/cuda/mla_decode/decode_params.h"

namespace snapmla::cuda {

// p_block: 64 or 128 tokens per P scale.
void launch_mla_decode_fp8(const DecodeParams& params, int p_block, cudaStream_t stream);

}  // namespace snapmla::cuda
