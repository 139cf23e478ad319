// Merges the splits of requests that were split, and writes zeros for empty ones.
#pragma once

#include <cuda_runtime.h>

#include "backends/cuda/mla_decode/decode_params.h"

namespace snapmla::cuda {

void launch_combine(const DecodeParams& params, cudaStream_t stream);

// The same for the FP8 kernel's partial results (fragments.h).
void launch_combine_fragments(const DecodeParams& params, cudaStream_t stream);

}  // namespace snapmla::cuda
