// Absorbed MLA decode over the BF16 cache: S = Q K^T, online softmax, O = P V, V = latent of K.
//
//   rows of a CTA: 64 of the seqlen_q * heads_q flattened rows; tile: 128 tokens, two pages
//   Q [64 x 576] bf16, page [64 x 576] bf16 (512 latent, 64 rope), O [64 x 512] f32 in registers
//
// Grid: parts * row_tiles CTAs of 384 threads, one per SM, in clusters of two where there are
// several row tiles. Each walks the items of its part.
//   warpgroup 0 (40 registers)   warps 0, 1: pages of slot 0, 1; warps 2, 3: queries
//   warpgroup 1, "even"          scores of even pages; output dims 0-255 ("L")
//   warpgroup 2, "odd"           scores of odd pages; output dims 256-511 ("R")
//
// O fills the registers of two warpgroups, so there is no second O to alternate with: as in
// FlashMLA's "seesaw", the warpgroups score one page each, own half of the output dims each, and
// exchange P through shared memory. What is different here: the softmax reference is lazy
// (bf16_softmax.h), so P of the even page is handed over at once and neither P nor O is rescaled;
// P travels in fragment layout, thread to thread; copying warps issue plain bulk copies.
//
//   time   ->
//   tensor   | QK e     | QK o     | PV e R  | PV e L   | PV o (L and R)     | QK e+2 | ...
//   even     |          | softmax e|         |          | issue PV o L, QK e+2        |
//   odd      |          | PV e R   | softmax o          | issue PV o R       | issue QK o+2
//   copies     slot 0 is refilled group by group during PV e, slot 1 during PV o
//
// The odd softmax needs all of PV e beside it, or the tensor core runs dry before P of the odd page
// is there. So PV e R is queued behind QK o before that is awaited, and PV e L issued only when QK
// o is done: started earlier, it would merely slow QK o down. The first groups of QK e+2 are queued
// behind PV o L likewise.
//
// The tensor core is the limit at 128 rows: per tile 2304 clocks of QK and 2048 of PV. The ring has
// two pages and no more fits, so what decides is how early each group of a page is released.
//
// Shared memory (bytes): query 73,728; ring 2 x 73,728; P 8,192; sums and barriers 2,500.
#pragma once

#include "backends/cuda/mla_decode/bf16_load.h"
#include "backends/cuda/mla_decode/bf16_softmax.h"
#include "backends/cuda/mla_decode/bf16_storage.h"
#include "backends/cuda/mla_decode/bf16_store.h"
#include "backends/cuda/mla_decode/decode_params.h"
#include "backends/cuda/ptx/barrier.h"
#include "backends/cuda/ptx/fence.h"
#include "backends/cuda/ptx/mbarrier.h"
#include "backends/cuda/ptx/pdl.h"
#include "backends/cuda/ptx/prefetch.h"
#include "backends/cuda/ptx/wgmma.h"
#include "backends/cuda/ptx/wgmma_bf16.h"

namespace snapmla::cuda::bf16_decode {

// What a math warpgroup keeps while it works on an item.
struct MathState {
  float o[2][64];  // [half of the warpgroup's 256 dims][accumulators of 128 dims]
  float score[32];
  std::uint32_t p[4][4];
  RowPair rows;
  int visible[2];  // keys that the lane's rows g and g + 8 see
  int length;      // keys of the request
  int unmasked;    // keys that every row of the tile sees
  float scale;
  bool live;  // the warp has rows that exist
};

__device__ __forceinline__ int thread_in_group() { return static_cast<int>(threadIdx.x) & 127; }

// ---- matrix products ----

// The address, unknown to the compiler from here on: descriptors are cheap to make from it where
// they are used, and would spill if all of them were computed ahead of the loops.
struct Operand {
  std::uint32_t low, high;
  __device__ std::uint64_t at(int bytes) const {
    return std::uint64_t{high} << 32 | (low + static_cast<std::uint32_t>(bytes >> 4));
  }
};

__device__ __forceinline__ Operand operand(const void* shared, std::uint32_t leading_bytes) {
  std::uint32_t address = ptx::shared_address(shared);
  asm volatile("" : "+r"(address));
  const std::uint64_t d = ptx::descriptor_swizzle128(address, leading_bytes, 1024);
  return {static_cast<std::uint32_t>(d), static_cast<std::uint32_t>(d >> 32)};
}

// Issues groups kFrom to kTo - 1 of the scores of the page in the slot.
template <int kSlot, int kFrom = 0, int kTo = kGroups>
__device__ __forceinline__ void issue_scores(SharedStorage& s, std::uint32_t parity,
                                             float (&score)[32]) {
  const Operand query = operand(s.query, 16), keys = operand(s.keys[kSlot], 16);  // K-major
#pragma unroll
  for (int i = kFrom; i < kTo; ++i) {
    const int g = group_order(kSlot, i);
    wait(s.full[kSlot][g], parity);
    ptx::wgmma_fence();
#pragma unroll
    for (int c = first_chunk(g); c < first_chunk(g) + chunk_count(g); ++c) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = c * kChunkBytes + k * 32;
        ptx::wgmma_ss_m64n64k16_bf16(score, query.at(at), keys.at(at),
                                     i > 0 || c > first_chunk(g) || k > 0);
      }
    }
  }
  ptx::wgmma_commit();
}

// Issues O += P V for the warpgroup's dims, as two groups of 128 dims.
template <int kSlot, int kHalf>
__device__ __forceinline__ void issue_values(SharedStorage& s, MathState& m) {
  // MN-major: a row is a token (k) and holds the 64 output dims of a chunk.
  const Operand values = operand(s.keys[kSlot][kHalf * 4], kChunkBytes);
  ptx::pin_registers(m.o[0]);
  ptx::pin_registers(m.o[1]);
#pragma unroll
  for (int k = 0; k < 4; ++k) ptx::pin_registers(m.p[k]);
  ptx::wgmma_fence();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      ptx::wgmma_rs_m64n128k16_bf16_mn(m.o[h], m.p[k], values.at(h * 2 * kChunkBytes + k * 2048),
                                       1);
    }
    ptx::wgmma_commit();
  }
}

// Awaits both and releases their chunks. kBehind: wgmma groups issued after them.
template <int kSlot, int kHalf, int kBehind = 0>
__device__ __forceinline__ void finish_values(SharedStorage& s, MathState& m) {
  ptx::wgmma_wait<kBehind + 1>();
  arrive_warp(s.empty[kSlot][1 + kHalf * 2]);
  ptx::wgmma_wait<kBehind>();
  arrive_warp(s.empty[kSlot][2 + kHalf * 2]);
  if constexpr (kBehind > 0) return;  // touching O here would serialise those
  ptx::pin_registers(m.o[0]);
  ptx::pin_registers(m.o[1]);
}

// Awaits the scores of the page in the slot and releases its rope chunk.
template <int kSlot, int kBehind = 0>
__device__ __forceinline__ void finish_scores(SharedStorage& s, MathState& m) {
  ptx::wgmma_wait<kBehind>();
  ptx::pin_registers(m.score);
  arrive_warp(s.empty[kSlot][0]);
}

__device__ __forceinline__ void rescale_output(MathState& m, float2 factor) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      m.o[h][i] *= factor.x;
      m.o[h][i + 1] *= factor.x;
      m.o[h][i + 2] *= factor.y;
      m.o[h][i + 3] *= factor.y;
    }
  }
}

// ---- softmax of the warpgroup's own page, exchange of P ----

// 0 for every bf16 half that is not finite.
__device__ __forceinline__ std::uint32_t drop_non_finite(std::uint32_t pair) {
  if ((pair & 0x7f80u) == 0x7f80u) pair &= 0xffff0000u;
  if ((pair & 0x7f800000u) == 0x7f800000u) pair &= 0x0000ffffu;
  return pair;
}

// P = 0 does not stop NaN or infinity in V. From token `visible` of the page on, some row must not
// see: V of tokens that do not exist (from `valid` on, holding anything) becomes 0, and what is not
// finite becomes 0 in the others: rows that see it are NaN through their scores already. All
// threads of the warpgroup that scored the page, after its scores are complete.
template <int kSlot>
__device__ __noinline__ void clear_tail(SharedStorage& s, int visible, int valid) {
  const int chunk = (thread_in_group() & 63) >> 3, unit = thread_in_group() & 7;
  for (int token = max(visible, 0) + (thread_in_group() >> 6); token < kPageTokens; token += 2) {
    uint4& at = *reinterpret_cast<uint4*>(&s.keys[kSlot][chunk][token * 128 + unit * 16]);
    const uint4 x = token < valid ? at : make_uint4(0, 0, 0, 0);
    at = make_uint4(drop_non_finite(x.x), drop_non_finite(x.y), drop_non_finite(x.z),
                    drop_non_finite(x.w));
  }
  ptx::fence_proxy_async_shared();
  s.hand_over.sync(kFilled + kSlot, 128);
}

// Scores -> P. Returns true if O must be multiplied by `rescale` first.
template <int kSlot>
__device__ __forceinline__ bool softmax_page(SharedStorage& s, MathState& m, int page,
                                             float2& rescale) {
  const int first_key = page * kPageTokens;
  rescale = make_float2(1.0f, 1.0f);
  if (first_key + kPageTokens > m.unmasked) {
    mask_scores(m.score, first_key + (thread_in_group() & 3) * 2, m.visible);
    clear_tail<kSlot>(s, m.unmasked - first_key, m.length - first_key);
  }
  if (m.live) return online_softmax(m.score, m.p, m.rows, m.scale, rescale);
#pragma unroll
  for (int k = 0; k < 16; ++k) m.p[k >> 2][k & 3] = 0;
  return false;
}

__device__ __forceinline__ void publish_p(SharedStorage& s, const MathState& m) {
  const int thread = thread_in_group();
#pragma unroll
  for (int k = 0; k < 4; ++k)
    s.p[k][thread] = make_uint4(m.p[k][0], m.p[k][1], m.p[k][2], m.p[k][3]);
  __syncwarp();  // the quad has read the reference that its first lane now writes
  if ((thread & 3) == 0) {
    const int row = (thread >> 5) * 16 + ((thread & 31) >> 2);
    s.reference[row] = m.rows.reference[0];
    s.reference[row + 8] = m.rows.reference[1];
  }
}

// Takes the other warpgroup's P, and its references if they have moved. O is not in flight; scores
// may be. They are not awaited in the branch, which not all warps of the warpgroup take: synccheck
// calls that an error.
__device__ __forceinline__ void adopt_p(const SharedStorage& s, MathState& m) {
  const int thread = thread_in_group();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint4 v = s.p[k][thread];
    m.p[k][0] = v.x, m.p[k][1] = v.y, m.p[k][2] = v.z, m.p[k][3] = v.w;
  }
  const int row = (thread >> 5) * 16 + ((thread & 31) >> 2);
  const float theirs[2] = {s.reference[row], s.reference[row + 8]};
  if (__any_sync(kAllLanes, theirs[0] != m.rows.reference[0] || theirs[1] != m.rows.reference[1])) {
    rescale_output(m, move_reference(m.rows, theirs[0], theirs[1]));
  }
}

// ---- the two warpgroups ----

// `page`: the even page of the tile, its scores complete. kTwo: the tile has an odd page. kNext: a
// tile follows; its scores are complete on return. `order`: that tile has two pages. kEarly: groups
// of its scores that are queued behind PV.
template <int kEarly, bool kTwo, bool kNext>
__device__ __forceinline__ void even_tile(SharedStorage& s, MathState& m, int page,
                                          std::uint32_t& parity, bool order) {
  static_assert(kTwo || !kNext, "only the last tile of an item may have one page");
  float2 rescale;
  if (softmax_page<0>(s, m, page, rescale)) rescale_output(m, rescale);
  publish_p(s, m);
  s.hand_over.arrive(kEvenReady, 256);
  if constexpr (kTwo) s.hand_over.sync(kOddScored, 256);
  issue_values<0, 0>(s, m);
  finish_values<0, 0>(s, m);
  if constexpr (kTwo) {
    s.hand_over.sync(kOddReady, 256);
    adopt_p(s, m);
    issue_values<1, 0>(s, m);
    if constexpr (!kNext) {
      finish_values<1, 0>(s, m);
    } else {
      ptx::pin_registers(m.score);
      issue_scores<0, 0, kEarly>(s, parity, m.score);
      finish_values<1, 0, 1>(s, m);
      issue_scores<0, kEarly, kGroups>(s, parity, m.score);
      if (order) s.hand_over.arrive(kScoresIssued, 256);
      finish_scores<0>(s, m);
      ptx::pin_registers(m.o[0]);
      ptx::pin_registers(m.o[1]);
      parity ^= 1;
    }
  }
}

// `page`: the odd page of the tile.
__device__ __forceinline__ void odd_tile(SharedStorage& s, MathState& m, int page,
                                         std::uint32_t& parity) {
  s.hand_over.sync(kScoresIssued, 256);  // odd scores are issued after even ones
  ptx::wgmma_wait<0>();  // nothing is in flight: ptxas learns that adopt_p may touch O beside them
  ptx::pin_registers(m.o[0]);
  ptx::pin_registers(m.o[1]);
  ptx::pin_registers(m.score);
  issue_scores<1>(s, parity, m.score);
  parity ^= 1;
  s.hand_over.sync(kEvenReady, 256);
  adopt_p(s, m);
  issue_values<0, 1>(s, m);
  finish_scores<1, 2>(s, m);
  s.hand_over.arrive(kOddScored, 256);
  // The softmax writes its own P: the registers of the even P are still being read.
  std::uint32_t even_p[4][4];
#pragma unroll
  for (int k = 0; k < 16; ++k) even_p[k >> 2][k & 3] = m.p[k >> 2][k & 3];
  float2 rescale;
  const bool moved = softmax_page<1>(s, m, page, rescale);
  publish_p(s, m);
  s.hand_over.arrive(kOddReady, 256);
  finish_values<0, 1>(s, m);
#pragma unroll
  for (int k = 0; k < 4; ++k) ptx::pin_registers(even_p[k]);
  if (moved) rescale_output(m, rescale);
  issue_values<1, 1>(s, m);
  finish_values<1, 1>(s, m);
}

// Sets up an item; O and the sums start from zero.
__device__ __forceinline__ void begin_item(const DecodeParams& p, MathState& m, int length,
                                           int row_begin) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < 64; ++i) m.o[h][i] = 0.0f;
  }
  reset(m.rows);
  // Causal, bottom right: query token t sees keys before length - seqlen_q + t + 1.
  const auto visible = [&](int row) {
    const int token = min(row / p.heads_q, p.seqlen_q - 1);
    return length - p.seqlen_q + token + 1;
  };
  const int row = row_begin + (thread_in_group() >> 5) * 16 + ((thread_in_group() & 31) >> 2);
  m.length = length;
  m.visible[0] = visible(row);
  m.visible[1] = visible(row + 8);
  m.unmasked = visible(row_begin);
}

template <int kEarly>
__device__ __forceinline__ void compute_even(const DecodeParams& p, SharedStorage& s,
                                             PartItems items, int row_begin) {
  MathState m;
  m.scale = p.scale_log2e;
  m.live = row_begin + (thread_in_group() >> 5) * 16 < p.rows;
  std::uint32_t parity = 0, item_parity = 0;
  for (int n = 0; n < items.count; ++n, item_parity ^= 1) {
    if (n + 1 == items.count) ptx::griddepcontrol_launch_dependents();
    const DecodeItem item = *items.at(p.plan, n);
    const PageRange pages = page_range(item);
    begin_item(p, m, item.length, row_begin);
    wait(s.query_full, item_parity);
    ptx::pin_registers(m.score);
    issue_scores<0>(s, parity, m.score);
    if (pages.first + 1 < pages.end) s.hand_over.arrive(kScoresIssued, 256);
    finish_scores<0>(s, m);
    parity ^= 1;
    int page = pages.first;
    for (; page + 2 < pages.end; page += 2)
      even_tile<kEarly, true, true>(s, m, page, parity, page + 3 < pages.end);
    arrive_warp(s.query_empty);
    if (page + 1 < pages.end) {
      even_tile<kEarly, true, false>(s, m, page, parity, false);
    } else {
      even_tile<kEarly, false, false>(s, m, page, parity, false);
    }
    store_item<0>(p, s, item, m.o, m.rows, row_begin, item_parity);
  }
}

__device__ __forceinline__ void compute_odd(const DecodeParams& p, SharedStorage& s,
                                            PartItems items, int row_begin) {
  MathState m;
  m.scale = p.scale_log2e;
  m.live = row_begin + (thread_in_group() >> 5) * 16 < p.rows;
  std::uint32_t parity = 0, item_parity = 0;
  for (int n = 0; n < items.count; ++n, item_parity ^= 1) {
    const DecodeItem item = *items.at(p.plan, n);
    const PageRange pages = page_range(item);
    begin_item(p, m, item.length, row_begin);
    int page = pages.first + 1;
    if (page < pages.end) {
      wait(s.query_full, item_parity);
      for (; page < pages.end; page += 2) odd_tile(s, m, page, parity);
      arrive_warp(s.query_empty);
    } else {
      arrive_warp(s.query_empty);
    }
    if ((pages.end - pages.first) & 1) {  // the last tile has no odd page
      s.hand_over.sync(kEvenReady, 256);
      adopt_p(s, m);
      issue_values<0, 1>(s, m);
      finish_values<0, 1>(s, m);
    }
    store_item<1>(p, s, item, m.o, m.rows, row_begin, item_parity);
  }
}

__device__ __forceinline__ void init_barriers(SharedStorage& s) {
  const auto init = [](std::uint64_t& barrier, std::uint32_t arrivals) {
    ptx::mbarrier_init(ptx::shared_address(&barrier), arrivals);
  };
  for (int slot = 0; slot < 2; ++slot) {
    for (int g = 0; g < kGroups; ++g) {
      init(s.full[slot][g], 1);
      init(s.empty[slot][g], 4 * ptx::kArrivingLanes);
    }
  }
  init(s.query_full, 2 * ptx::kArrivingLanes);
  init(s.query_empty, 8 * ptx::kArrivingLanes);
  for (const int barrier : {kEvenReady, kOddReady, kScoresIssued, kItemDone, kOddScored})
    s.hand_over.init(barrier, 256);
  for (const int slot : {0, 1}) s.hand_over.init(kFilled + slot, 128);
  ptx::fence_mbarrier_init();
}

template <int kEarly>
__global__ void __launch_bounds__(kThreads, 1)
    bf16_decode_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  SharedStorage& s = *reinterpret_cast<SharedStorage*>(shared_bytes);
  const int part = static_cast<int>(blockIdx.x) / p.row_tiles;
  const int row_begin = (static_cast<int>(blockIdx.x) - part * p.row_tiles) * kRowTile;
  if (threadIdx.x == 0) init_barriers(s);
  __syncthreads();
  ptx::griddepcontrol_wait();  // the plan, the queries and the cache come from earlier kernels
  // Its first item arrives with the counts, not after them.
  ptx::prefetch_global_l1(&p.plan.parts[part].first);
  const PartItems items{part, p.plan.parts[part].begin, p.plan.parts[part].count};
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<kLoadRegisters>();
    const int warp = static_cast<int>(threadIdx.x >> 5);
    if (warp >= 2) {
      load_queries(p, s, items, row_begin);
    } else if (ptx::elect_one()) {
      if (warp == 0) {
        copy_pages<0>(p, s, items);
      } else {
        copy_pages<1>(p, s, items);
      }
    }
  } else if (threadIdx.x < 256) {
    ptx::setmaxnreg_inc<kMathRegisters>();
    compute_even<kEarly>(p, s, items, row_begin);
  } else {
    ptx::setmaxnreg_inc<kMathRegisters>();
    compute_odd(p, s, items, row_begin);
  }
}

}  // namespace snapmla::cuda::bf16_decode
