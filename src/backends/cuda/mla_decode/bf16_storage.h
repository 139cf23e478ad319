// Shared memory, barriers and constants of the BF16 decode kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backends/cuda/ptx/barrier.h"

namespace snapmla::cuda::bf16_decode {

inline constexpr int kChunkBytes = 64 * 128;  // 64 rows of 128 bytes (64 bf16), swizzled
inline constexpr int kLatentChunks = 8;
inline constexpr int kRopeChunk = 8;
inline constexpr int kChunks = 9;
inline constexpr int kPageTokens = 64;
inline constexpr int kThreads = 384;
// Registers per thread. What a CTA is launched with must cover them: 168 x 384 threads.
inline constexpr int kLoadRegisters = 40;
inline constexpr int kMathRegisters = 232;
static_assert(kLoadRegisters + 2 * kMathRegisters <= 3 * 168, "setmaxnreg would wait for ever");

// A page is copied, awaited and released in five groups of chunks: the rope chunk, which only the
// scores need, and four pairs of latent chunks (128 output dims each).
inline constexpr int kGroups = 5;
__host__ __device__ constexpr int first_chunk(int group) {
  return group == 0 ? kRopeChunk : 2 * (group - 1);
}
__host__ __device__ constexpr int chunk_count(int group) { return group == 0 ? 1 : 2; }

// Slot 0 holds the even pages of an item (first page of each tile), slot 1 the odd ones. Groups are
// copied, and taken by the scores, in the order in which the page before leaves the slot.
__host__ __device__ constexpr int group_order(int slot, int i) {
  constexpr int kOrder[2][kGroups] = {{0, 1, 2, 3, 4}, {0, 1, 3, 2, 4}};
  return kOrder[slot][i];
}

// Who arrives -> who waits.
enum NamedBarrier : int {
  kEvenReady = 1,  // even warpgroup: P of the even page is written -> odd warpgroup
  kOddReady = 2,   // odd warpgroup: P of the odd page is written -> even warpgroup
  kScoresIssued =
      3,           // even warpgroup: its scores are all issued -> odd warpgroup may issue its own
  kItemDone = 4,   // both warpgroups: row sums of an item are written
  kFilled = 5,     // + warpgroup: its zeros past the end of a request are written -> itself
  kOddScored = 7,  // odd warpgroup: its scores are complete -> even warpgroup may issue PV e L
};

struct alignas(1024) SharedStorage {
  std::uint8_t query[kChunks][kChunkBytes];
  std::uint8_t keys[2][kChunks][kChunkBytes];
  // P of the page under way, as the wgmma registers of each thread: thread t of one math warpgroup
  // writes what thread t of the other reads, so one buffer serves both directions.
  uint4 p[4][128];
  float reference[64];              // R of the rows when that P was made
  float2 row_sums[2][2][64];        // [item parity][warpgroup][row]: f32 sum, sum of rounded P
  std::uint64_t full[2][kGroups];   // 1 arrival + bytes: group has landed
  std::uint64_t empty[2][kGroups];  // 4 warps: group is no longer read
  std::uint64_t query_full;         // 2 load warps
  std::uint64_t query_empty;        // 8 math warps
  ptx::HandOverBarriers<kOddScored> hand_over;
};
static_assert(sizeof(SharedStorage) <= 232448, "an SM offers 227 KiB to a CTA");

}  // namespace snapmla::cuda::bf16_decode
