// Traits and shared memory of the FP8 decode kernel, and what all of its warps use. See
// fp8_kernel.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backends/cuda/mla_decode/decode_params.h"
#include "backends/cuda/ptx/mbarrier.h"
#include "backends/cuda/ptx/wgmma.h"

namespace snapmla::cuda {

// kRows: rows that PV computes, the width N of its wgmma. kPBlock: tokens that share a P scale.
template <int kRows_, int kPBlock_>
struct Fp8DecodeTraits {
  static constexpr int kRows = kRows_;
  static constexpr int kPBlock = kPBlock_;
  static_assert(kRows == 16 || kRows == 32 || kRows == 64, "PV width is 16, 32 or 64 rows");
  static_assert(kPBlock == 64 || kPBlock == 128, "P is quantised per 64 or 128 tokens");
  static constexpr int kBlocks = kTileTokens / kPBlock;  // P blocks of a tile
  static constexpr bool kTransposedScores = kRows < 64;  // fp8_score_few.h
  static constexpr int kThreads = 512;
  // Registers per thread: 128 * (24 + scores + 2 * pv) = 65,536 at most. With fewer rows O is
  // small and the score warps may keep more.
  static constexpr int kScoreRegisters = kRows == 64 ? 104 : 168;
  static constexpr int kPvRegisters = kRows == 64 ? 192 : 144;
};

inline constexpr int kPageBytesChunk = 8192;  // 64 tokens x 128 bytes
inline constexpr int kChunkBytes = 16384;     // 128 tokens x 128 bytes
inline constexpr int kLatentChunks = 4, kRopeChunk = 4, kChunks = 5;
// Chunks that arrive and are released together: {0, 2}, the first half of each PV warpgroup's dims;
// {1, 3}, the second; rope, with the token factors.
inline constexpr int kRopeGroup = 2, kGroups = 3;
inline constexpr int kQueryChunkBytes = 64 * 128;  // 64 rows x 128 bytes
// Per-row floats (sigma, 1/l, rescale) lie by lane: lane t of a quad owns rows 8n + 2t + e and
// reads them as 16-byte vectors at t * 20 + 2n + e, free of bank conflicts.
inline constexpr int kRowFloats = 80;
__device__ __forceinline__ int row_float(int row) {
  return ((row & 7) >> 1) * 20 + (row >> 3) * 2 + (row & 1);
}

// What does not depend on the width of a row tile. It lies at the same place for all widths, so
// that a kernel with two programs sets it up, and copies keys into it, before it matters which one
// runs.
template <int kBlocks>
struct alignas(1024) Fp8SharedCommon {
  static constexpr int kStages = 2;
  std::uint8_t query[kChunks][kQueryChunkBytes];     // chunk 4: rope
  std::uint8_t keys[kStages][kChunks][kChunkBytes];  // chunk 4: rope
  float token_scale[2][kTileTokens];                 // s of each token, 0 past the end, NaN if bad
  // f16 s_min / s of each token, as the score warps read it: see make_factors.
  std::uint32_t sum_factors[2][4][16];
  float sigma[2][kBlocks][kRowFloats];
  float rescale[2][kRowFloats];
  float inverse_sum[4][kRowFloats];  // 1 / l, by item: PV may be three items behind
  float merge_weight[2][kMergeSplits + 1]
                    [kRowFloats];  // of each PV warpgroup, of the splits it merges
  int arrived[2];                  // of each PV warpgroup, read by one thread
  float sum_norm[2][kBlocks];      // 1 / s_min of the block
  std::uint32_t rescale_flags[2];  // byte w: score warp w moved a reference
  alignas(16) int stop[4];         // of the exponentials: fp8_score.h
  int seen_more[kRowFloats];       // keys that a row sees more than row 0, which sees the fewest
  // Of each row; bytes from the request's start, -1 where there is no row.
  std::int64_t out_offset[64], scale_offset[64];
  std::int64_t lse_offset[64];  // elements
  int hidden[64];               // keys at the end that the row must not see
  std::uint64_t k_full[kStages][kGroups], k_empty[kStages][kGroups];
  std::uint64_t p_full[2], p_empty[2];
  std::uint64_t l_full[2];  // by item: 1 / l and lse are there
  std::uint64_t q_full, q_empty;
};

template <class Traits>
struct Fp8SharedStorage : Fp8SharedCommon<Traits::kBlocks> {
  alignas(1024) std::uint8_t p[2][Traits::kRows * 128];  // [row][128 tokens] e4m3, swizzled
  // Few rows: maxima and sums of each row pair by warp: [n][t][warp].
  alignas(16)
      float2 across[2][Traits::kBlocks][Traits::kTransposedScores ? Traits::kRows / 8 : 1][4][4];
  alignas(16) float2 across_sum[Traits::kTransposedScores ? Traits::kRows / 8 : 1][4][4];
};

namespace fp8_decode {

using namespace ptx;

// Ring position of the n-th tile of this CTA: slot n % 2, phase n / 2 % 2.
struct Turn {
  std::uint32_t n = 0;
  __device__ int slot() const { return static_cast<int>(n & 1); }
  __device__ std::uint32_t phase() const { return (n >> 1) & 1; }
  __device__ void next() { ++n; }
};

// The same value, through a shuffle with itself: the compiler would otherwise read the thread index
// anew at every use, at about 50 cycles each, to save a register.
__device__ __forceinline__ int keep(int value) {
  return __shfl_sync(~0u, value, static_cast<int>(threadIdx.x & 31));
}

template <class... Barriers>
__device__ __forceinline__ void arrive_warp(Barriers&... barriers) {
  mbarrier_arrive_warp(shared_address(&barriers)...);
}

__device__ __forceinline__ void wait(std::uint64_t& barrier, std::uint32_t phase) {
  mbarrier_wait(shared_address(&barrier), phase);
}

__device__ __forceinline__ std::uint64_t k_major(std::uint32_t address) {
  return descriptor_swizzle128(address, 16, 1024);
}

// What the rows of this CTA have in common over all items, for thread `r` of 64.
template <class Storage>
__device__ __forceinline__ void place_row(const DecodeParams& p, Storage& s, int row_begin, int r) {
  const RowPlace at(row_begin + r, p.heads_q);
  const bool exists = row_begin + r < p.rows;
  s.out_offset[r] = exists ? at.token * p.out_stride.token + at.head * p.out_stride.head : -1;
  s.scale_offset[r] =
      exists ? at.token * p.q_scale_stride.token + at.head * p.q_scale_stride.head : -1;
  s.lse_offset[r] = exists ? at.token * p.lse_token_stride + at.head * p.lse_head_stride : -1;
  s.hidden[r] = max(0, p.seqlen_q - 1 - at.token);
}

}  // namespace fp8_decode
}  // namespace snapmla::cuda
