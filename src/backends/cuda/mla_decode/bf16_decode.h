// Host entry of the BF16 MLA decode kernel.
#pragma once

#include <cuda_runtime.h>

#include "backends/cuda/mla_decode/decode_params.h"

namespace snapmla::cuda {

// One pass over the BF16 cache (KvCacheFormat::kBf16, PageImage::kSwizzled128): writes out and lse
// of requests with one item, and partial results of the others for the combine kernel. Pointers and
// strides of queries and pages are multiples of 16 bytes, of outputs of 8 bytes. Allocates nothing
// and does not synchronise. Throws Error if the launch is refused.
void launch_mla_decode_bf16(const DecodeParams& params, cudaStream_t stream);

}  // namespace snapmla::cuda
