// The copying warps of the BF16 decode kernel: pages into the ring, queries into the swizzled
// image.
#pragma once

#include "backends/cuda/mla_decode/bf16_storage.h"
#include "backends/cuda/mla_decode/decode_params.h"
#include "backends/cuda/ptx/bulk_copy.h"
#include "backends/cuda/ptx/fence.h"
#include "backends/cuda/ptx/mbarrier.h"
#include "backends/cuda/ptx/shared.h"

namespace snapmla::cuda::bf16_decode {

__device__ __forceinline__ void wait(std::uint64_t& barrier, std::uint32_t parity) {
  ptx::mbarrier_wait(ptx::shared_address(&barrier), parity);
}

// All lanes of the warp are done with what the barrier guards.
__device__ __forceinline__ void arrive_warp(std::uint64_t& barrier) {
  ptx::mbarrier_arrive_warp(ptx::shared_address(&barrier));
}

// Pages [first, end) of the request that an item covers.
struct PageRange {
  int first, end;
};

__device__ __forceinline__ PageRange page_range(const DecodeItem& item) {
  return {item.tile_begin * 2,
          min(item.tile_end * 2, (item.length + kPageTokens - 1) / kPageTokens)};
}

// One thread per slot: every second page of each item. Entries of the block table past the
// request's last page are not read.
template <int kSlot>
__device__ void copy_pages(const DecodeParams& p, SharedStorage& s, PartItems items) {
  // PERF: with many row tiles a page is read again, and must still be in L2: evict-first cost 5% at
  // 256 rows. With one or two it is no slower on big batches, and faster where replays of one call
  // find a part of few keys in L2 (8 x 8,192 tokens, 128 rows, 51.7 -> 47.1 us), which no model's
  // next layer would.
  const bool evict_first = p.row_tiles <= 2;
  const std::uint64_t policy = ptx::l2_policy_evict_first();
  std::uint32_t parity = 1;  // the first pass over the ring finds it empty
  for (int n = 0; n < items.count; ++n) {
    const DecodeItem item = *items.at(p.plan, n);
    const PageRange pages = page_range(item);
    const std::int32_t* table = p.block_table + item.request * p.table_stride;
    int page = pages.first + kSlot;
    std::int64_t next = page < pages.end ? table[page] : 0;
    for (; page < pages.end; page += 2, parity ^= 1) {
      const int page_id = static_cast<int>(next);
      const std::uint8_t* latent = p.kv_latent + next * p.latent_page_stride;
      const std::uint8_t* rope = p.kv_rope + next * p.rope_page_stride;
      if (page + 2 < pages.end) next = table[page + 2];  // ahead of the waits, to hide its latency
#pragma unroll
      for (int o = 0; o < kGroups; ++o) {
        const int g = group_order(kSlot, o), chunk = first_chunk(g);
        const std::uint32_t bytes = static_cast<std::uint32_t>(chunk_count(g) * kChunkBytes);
        const std::uint8_t* from = g == 0 ? rope : latent + chunk * kChunkBytes;
        const std::uint32_t to = ptx::shared_address(s.keys[kSlot][chunk]);
        const std::uint32_t full = ptx::shared_address(&s.full[kSlot][g]);
        wait(s.empty[kSlot][g], parity);
        ptx::mbarrier_arrive_expect_tx(full, bytes);
        if (p.plain_rows) {
          for (int c = 0; c < chunk_count(g); ++c) {
            ptx::tensor_copy_g2s(to + static_cast<std::uint32_t>(c * kChunkBytes),
                                 g == 0 ? &p.rope_map : &p.latent_map,
                                 g == 0 ? 0 : (chunk + c) * 128, 0, page_id, full);
          }
        } else if (evict_first) {
          ptx::bulk_copy_g2s(to, from, bytes, full, policy);
        } else {
          ptx::bulk_copy_g2s(to, from, bytes, full);
        }
      }
    }
  }
}

// 64 threads: 64 rows of each item's query; rows past the last become zeros and are not read.
__device__ inline void load_queries(const DecodeParams& p, SharedStorage& s, PartItems items,
                                    int row_begin) {
  const int unit = static_cast<int>(threadIdx.x) & 7;
  const int first_row = (static_cast<int>(threadIdx.x) & 63) >> 3;
  std::uint32_t parity = 1;
  for (int n = 0; n < items.count; ++n, parity ^= 1) {
    const std::int64_t request = items.at(p.plan, n)->request;
    wait(s.query_empty, parity);
    RowPlace place(row_begin + first_row, p.heads_q);
#pragma unroll 1
    for (int r = first_row; r < kRowTile; r += 8, place.advance(8, p.heads_q)) {
      const bool exists = row_begin + r < p.rows;
      const int token = exists ? place.token : 0, head = exists ? place.head : 0;
      const std::uint8_t* latent = p.q_latent + request * p.q_latent_stride.batch +
                                   token * p.q_latent_stride.token + head * p.q_latent_stride.head +
                                   unit * 16;
      const std::uint8_t* rope = p.q_rope + request * p.q_rope_stride.batch +
                                 token * p.q_rope_stride.token + head * p.q_rope_stride.head +
                                 unit * 16;
      const std::uint32_t bytes = exists ? 16 : 0;
      const std::uint32_t to = ptx::shared_address(s.query) +
                               static_cast<std::uint32_t>(r * 128 + ((unit ^ (r & 7)) << 4));
#pragma unroll
      for (int c = 0; c < kLatentChunks; ++c)
        ptx::cp_async_16(to + static_cast<std::uint32_t>(c * kChunkBytes), latent + c * 128, bytes);
      ptx::cp_async_16(to + kRopeChunk * kChunkBytes, rope, bytes);
    }
    ptx::cp_async_wait_all();
    ptx::fence_proxy_async_shared();
    arrive_warp(s.query_full);
  }
}

}  // namespace snapmla::cuda::bf16_decode
