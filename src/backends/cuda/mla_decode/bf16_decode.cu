// Launch of the BF16 decode kernel.
// PTXAS: no-spill
#include "backends/cuda/mla_decode/bf16_decode.h"

#include "backends/cuda/launch.h"
#include "backends/cuda/mla_decode/bf16_kernel.h"
#include "backends/cuda/mla_decode/cutting.h"

namespace snapmla::cuda {

void launch_mla_decode_bf16(const DecodeParams& params, cudaStream_t stream) {
  constexpr int kSharedBytes = static_cast<int>(sizeof(bf16_decode::SharedStorage));
  // PERF: with one or two row tiles the second group of the next keys is often not there yet, and
  // waiting for it holds back the release of the odd page: 462 -> 469 us at 128 rows. With more,
  // pages come from L2: 862 -> 852 us at 256 rows.
  const auto kernel = params.row_tiles > 2 ? &bf16_decode::bf16_decode_kernel<2>
                                           : &bf16_decode::bf16_decode_kernel<1>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "mla_decode (bf16): shared memory");
  launch_clusters("mla_decode (bf16)", Ordering::kOverlap, kernel,
                  dim3(static_cast<unsigned>(params.ctas)), dim3(bf16_decode::kThreads),
                  cluster_size(params.ctas, params.row_tiles), kSharedBytes, stream, params);
}

}  // namespace snapmla::cuda
