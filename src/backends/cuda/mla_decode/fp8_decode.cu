// All instances of the FP8 decode kernel. Registers are full to the last; what ptxas spills lies
// where an item begins and ends, with 64 rows and P blocks of 64 also in PV's loop over tiles.
// PTXAS: spill <= 512
#include "backends/cuda/mla_decode/fp8_kernel.h"

#include "backends/cuda/launch.h"
#include "backends/cuda/mla_decode/cutting.h"
#include "backends/cuda/mla_decode/fp8_launch.h"

namespace snapmla::cuda {
namespace {

template <class Traits>
void launch_kernel(void (*kernel)(DecodeParams), const DecodeParams& p, cudaStream_t stream) {
  constexpr int kSharedBytes = static_cast<int>(sizeof(Fp8SharedStorage<Traits>));
  static_assert(kSharedBytes <= 232448, "shared memory of a Hopper CTA: 227 KiB");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "mla_decode: shared memory");
  launch_clusters("mla_decode", Ordering::kOverlap, kernel, dim3(static_cast<unsigned>(p.ctas)),
                  dim3(Traits::kThreads), cluster_size(p.ctas, p.row_tiles), kSharedBytes, stream,
                  p);
}

template <int kRows, int kPBlock>
void launch_width(const DecodeParams& p, cudaStream_t stream) {
  using Traits = Fp8DecodeTraits<kRows, kPBlock>;
  if constexpr (kRows > kNarrowTile) {
    using Narrow = Fp8DecodeTraits<kNarrowTile, kPBlock>;
    static_assert(sizeof(Fp8SharedStorage<Narrow>) <= sizeof(Fp8SharedStorage<Traits>));
    if (p.narrow_tiles > 0)
      return launch_kernel<Traits>(fp8_decode::fp8_decode_either_kernel<Traits, Narrow>, p, stream);
  }
  launch_kernel<Traits>(fp8_decode::fp8_decode_kernel<Traits>, p, stream);
}

template <int kPBlock>
void launch_rows(const DecodeParams& p, cudaStream_t stream) {
  if (p.row_width == 16) return launch_width<16, kPBlock>(p, stream);
  if (p.row_width == 32) return launch_width<32, kPBlock>(p, stream);
  launch_width<64, kPBlock>(p, stream);
}

}  // namespace

void launch_mla_decode_fp8(const DecodeParams& p, int p_block, cudaStream_t stream) {
  if (p_block == 64) return launch_rows<64>(p, stream);
  launch_rows<128>(p, stream);
}

}  // namespace snapmla::cuda
