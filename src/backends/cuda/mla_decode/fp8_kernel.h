// Absorbed MLA decode over the FP8 cache: scores, online softmax, P quantised per block, PV.
//
//   S~ = q^ K^T (e4m3, 512 wide) + q_rope' k_rope'^T (bf16, 64 wide)       [rows x 128 tokens]
//   y_ij = S~_ij s_k[j] c_i + log2 s_k[j],  c_i = s_q[i] softmax_scale log2 e
//   P'_ij = e4m3(448 * 2^(y_ij - m_i)),  T_i = sum_j P'_ij k^_j  per block of kPBlock tokens
//   O_i += sigma_i T_i,  l_i += sigma_i sum_j P'_ij / s_k[j],  sigma_i = 2^(m_i - R_i) / 448
//
// The rules are those of numeric/softmax.h (SnapMLA, scale-fused PV pipeline, in the log domain).
// V is the latent itself: FP8 wgmma takes K-major operands only, so PV is computed transposed,
// O^T = V^T P^T, with the V^T fragments built in registers (ldmatrix.trans + one byte permute) and
// P as the shared-memory operand. FP8 accumulators keep about 14 bits: T starts from zero in every
// block and is added to O in f32 (two-level accumulation).
//
// Grid: a CTA of 512 threads per part and row tile, one per SM, in clusters of two where there are
// several (of the wider) row tiles. Each walks the items of its part.
//   warpgroup 0 (24 registers)   warp 0: page copies; warp 1: token factors; warps 2, 3: query
//   warpgroup 1                  scores, softmax, P; up to 32 rows: transposed, fp8_score_few.h
//   warpgroups 2, 3              PV, output dims 0-255 and 256-511; merging of splits, fp8_store.h
//
//   tile:     j                    j+1
//   wg 1    | QK(j) | softmax(j) | QK(j+1) | softmax(j+1) |
//   wg 2,3  |    PV(j-1)         |     PV(j)              |
//   copies  |  chunk by chunk into the ring of two tiles, as QK and PV release them
//
// Shared memory (bytes): query 40,960; ring 2 x (4 x 16,384 latent + 16,384 rope); P 2 x 8,192;
// factors, weights, row places and barriers 9,216 with padding, with P blocks of 64 10,240; maxima
// across warps 1,024. See Fp8SharedCommon and Fp8SharedStorage.
#pragma once

#include <type_traits>

#include "backends/cuda/mla_decode/fp8_load.h"
#include "backends/cuda/mla_decode/fp8_score.h"
#include "backends/cuda/mla_decode/fp8_score_few.h"
#include "backends/cuda/mla_decode/fp8_values.h"
#include "backends/cuda/ptx/barrier.h"
#include "backends/cuda/ptx/pdl.h"
#include "backends/cuda/ptx/prefetch.h"

namespace snapmla::cuda {
namespace fp8_decode {

// What needs no earlier kernel's results: the barriers, where rows lie.
template <int kBlocks>
__device__ __forceinline__ void set_up(const DecodeParams& p, Fp8SharedCommon<kBlocks>& s,
                                       int row_begin) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    const auto init = [](std::uint64_t& barrier, int warps, int threads) {
      mbarrier_init(shared_address(&barrier),
                    static_cast<std::uint32_t>(warps * kArrivingLanes + threads));
    };
    for (int slot = 0; slot < 2; ++slot) {
      for (int group = 0; group < kGroups; ++group) {
        const bool rope = group == kRopeGroup;
        init(s.k_full[slot][group], rope ? 1 : 0, 1);    // the token factors; the copies
        init(s.k_empty[slot][group], rope ? 4 : 12, 0);  // the score warps; the PV warps
      }
      init(s.p_full[slot], 4, 0);
      init(s.p_empty[slot], 8, 0);
    }
    for (auto& barrier : s.l_full) init(barrier, 4, 0);
    init(s.q_full, 2, 0);
    init(s.q_empty, 4, 0);
    s.rescale_flags[0] = s.rescale_flags[1] = 0;
    fence_mbarrier_init();
  }
  if (thread >= 128 && thread < 192) place_row(p, s, row_begin, thread - 128);
  __syncthreads();
}

// The parts' work. Two programs in one kernel: `narrow` says which; the same twice: there is no
// choice. PERF: roles first and programs second, so that the copies, with which everything starts,
// are the same code for both and near the kernel's entry (ptxas puts the last branch first). Of two
// programs one behind the other, the second starts 0.6 to 2 us late
// (docs/design/0007-row-tiles.md).
template <class Wide, class Narrow>
__device__ __forceinline__ void decode_items(const DecodeParams& p, std::uint8_t* shared_bytes,
                                             PartItems items, int row_begin, bool narrow) {
  constexpr bool kChoice = !std::is_same_v<Wide, Narrow>;
  static_assert(Wide::kBlocks == Narrow::kBlocks, "both programs have the same P blocks");
  auto& common = *reinterpret_cast<Fp8SharedCommon<Wide::kBlocks>*>(shared_bytes);
  // run(storage) as one program or the other: its parameter says which.
  const auto as_chosen = [&](auto run) {
    if constexpr (kChoice) {
      if (narrow) return run(*reinterpret_cast<Fp8SharedStorage<Narrow>*>(shared_bytes));
    }
    run(*reinterpret_cast<Fp8SharedStorage<Wide>*>(shared_bytes));
  };
  const int thread = static_cast<int>(threadIdx.x);
  const int warpgroup = __shfl_sync(~0u, thread >> 7, 0);  // the compiler sees that it is uniform
  if (warpgroup >= 2) {
    as_chosen([&]<class Traits>(Fp8SharedStorage<Traits>& s) {
      setmaxnreg_inc<Traits::kPvRegisters>();
      accumulate_values<Traits>(p, s, items, row_begin, warpgroup - 2);
    });
  } else if (warpgroup == 1) {
    as_chosen([&]<class Traits>(Fp8SharedStorage<Traits>& s) {
      if constexpr (Traits::kScoreRegisters > 128) setmaxnreg_inc<Traits::kScoreRegisters>();
      if constexpr (Traits::kScoreRegisters < 128) setmaxnreg_dec<Traits::kScoreRegisters>();
      if constexpr (Traits::kTransposedScores) {
        score_few<Traits>(p, s, items, row_begin);
      } else {
        score<Traits>(p, s, items, row_begin);
      }
    });
  } else {
    setmaxnreg_dec<24>();
    const int warp = thread >> 5;
    if (warp >= 2) {
      load_query(p, common, items, row_begin, narrow ? Narrow::kRows : Wide::kRows);
    } else if (warp == 1) {
      as_chosen(
          [&]<class Traits>(Fp8SharedStorage<Traits>&) { make_factors<Traits>(p, common, items); });
    } else if (elect_one()) {
      copy_pages(p, common, items);
      griddepcontrol_launch_dependents();  // combine may come while the last tiles are computed
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    fp8_decode_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  const int part = static_cast<int>(blockIdx.x) / p.row_tiles;
  const int row_begin = (static_cast<int>(blockIdx.x) % p.row_tiles) * Traits::kRows;
  set_up(p, *reinterpret_cast<Fp8SharedCommon<Traits::kBlocks>*>(shared_bytes), row_begin);
  griddepcontrol_wait();  // the plan, the query and the cache come from earlier kernels
  // Its first item arrives with the counts, not after them.
  prefetch_global_l1(&p.plan.parts[part].first);
  decode_items<Traits, Traits>(p, shared_bytes,
                               {part, p.plan.parts[part].begin, p.plan.parts[part].count},
                               row_begin, false);
}

// Items of a part, loaded here: the compiler would move a plain load to where it is used.
__device__ __forceinline__ PartItems items_of(const DecodeParams& p, int part) {
  PartItems items{part, 0, 0};
  asm volatile("ld.global.v2.s32 {%0, %1}, [%2];"
               : "=r"(items.begin), "=r"(items.count)
               : "l"(__cvta_generic_to_global(&p.plan.parts[part].begin)));
  return items;
}

// Where the plan decides whether a CTA computes 16 rows or up to 64 (plan.h). It is set up for the
// more, which then starts nearly as early as in a kernel of its own.
template <class Wide, class Narrow>
__global__ void __launch_bounds__(Wide::kThreads, 1)
    fp8_decode_either_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  auto& common = *reinterpret_cast<Fp8SharedCommon<Wide::kBlocks>*>(shared_bytes);
  const int cta = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int part = cta / p.row_tiles, narrow_part = cta / p.narrow_tiles;
  int row_begin = (cta - part * p.row_tiles) * Wide::kRows;
  set_up(p, common, row_begin);
  griddepcontrol_wait();
  prefetch_global_l1(&p.plan.parts[part].first);
  prefetch_global_l1(&p.plan.parts[narrow_part].first);
  PartItems items = items_of(p, part);
  const PartItems narrow_items = items_of(p, narrow_part);
  const bool narrow = __shfl_sync(~0u, *p.plan.narrow, 0) != 0;
  if (narrow) {
    items = narrow_items;
    row_begin = (cta - narrow_part * p.narrow_tiles) * Narrow::kRows;
    if (thread >= 128 && thread < 192) place_row(p, common, row_begin, thread - 128);
    __syncthreads();
  }
  decode_items<Wide, Narrow>(p, shared_bytes, items, row_begin, narrow);
}

}  // namespace fp8_decode
}  // namespace snapmla::cuda
