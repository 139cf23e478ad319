// Warpgroup 0 of the FP8 decode kernel: page copies, token factors, the query.
#pragma once

#include "backends/cuda/mla_decode/fp8_storage.h"
#include "backends/cuda/ptx/bulk_copy.h"
#include "backends/cuda/ptx/convert.h"
#include "backends/cuda/ptx/fence.h"
#include "backends/cuda/ptx/shared.h"

namespace snapmla::cuda {
namespace fp8_decode {

// One thread. Groups arrive in the order in which QK takes them, so that PV of the previous tile
// frees both halves of the output dims early. A second page that the request does not have is not
// looked up.
template <class Storage>
__device__ void copy_pages(const DecodeParams& p, Storage& s, PartItems items) {
  Turn turn;
  // PERF: a page need not stay in L2 once its row tiles have read it, and they do so together: 1.5%
  // at 16 and 64 rows, 1% at 128 and, with two row tiles to a cluster, at 256.
  const std::uint64_t policy = l2_policy_evict_first();
  for (int n = 0; n < items.count; ++n) {
    const DecodeItem* item = items.at(p.plan, n);
    int tile = item->tile_begin;
    const int tile_end = item->tile_end;
    const std::int32_t* entry = p.block_table + item->request * p.table_stride + tile * 2;
    int pages_left = (item->length + 63) / 64 - tile * 2;
    int next0 = entry[0], next1 = pages_left > 1 ? entry[1] : -1;
    for (; tile < tile_end; ++tile, turn.next()) {
      const int page0 = next0, page1 = next1;
      entry += 2;
      pages_left -= 2;
      if (tile + 1 < tile_end) {  // before the waits: hides the latency of the table
        next0 = entry[0];
        next1 = pages_left > 1 ? entry[1] : -1;
      }
      const int slot = turn.slot();
      const auto begin = [&](int group, int chunks) {
        wait(s.k_empty[slot][group], turn.phase() ^ 1);
        const std::uint32_t full = shared_address(&s.k_full[slot][group]);
        mbarrier_arrive_expect_tx(full, chunks * kPageBytesChunk * (page1 < 0 ? 1 : 2));
        return full;
      };
      // One chunk of both pages, each from its plane, to consecutive places.
      const auto copy = [&](int c, std::uint32_t full) {
        const bool rope = c == kRopeChunk;
        const std::uint32_t to = shared_address(s.keys[slot][c]);
        const auto copy_page = [&](std::uint32_t place, int page) {
          if (p.plain_rows) {
            tensor_copy_g2s(place, rope ? &p.rope_map : &p.latent_map, rope ? 0 : c * 128, 0, page,
                            full);
            return;
          }
          const std::uint8_t* from =
              rope ? p.kv_rope + page * p.rope_page_stride
                   : p.kv_latent + page * p.latent_page_stride + c * kPageBytesChunk;
          bulk_copy_g2s(place, from, kPageBytesChunk, full, policy);
        };
        copy_page(to, page0);
        if (page1 >= 0) copy_page(to + kPageBytesChunk, page1);
      };
#pragma unroll 1
      for (int c = 0; c < 2; ++c) {
        const std::uint32_t full = begin(c, 2);
#pragma unroll 1
        for (int chunk = c; chunk < kLatentChunks; chunk += 2) copy(chunk, full);
      }
      copy(kRopeChunk, begin(kRopeGroup, 1));
    }
  }
}

// One warp: what the score warps need of each token, from its scale. Tokens past the end of the
// request get zeros (their scales may be anything). A scale that is not positive is NaN. Scales are
// read straight from global memory, a tile ahead, and page numbers two tiles ahead.
template <class Traits, class Storage>
__device__ void make_factors(const DecodeParams& p, Storage& s, PartItems items) {
  const int lane = threadIdx.x & 31, page = lane >> 4;  // four tokens per lane
  Turn turn;
  for (int n = 0; n < items.count; ++n) {
    const DecodeItem* item = items.at(p.plan, n);
    const int tile_begin = item->tile_begin;
    int tiles_left = item->tile_end - tile_begin;
    int valid = item->length - tile_begin * kTileTokens - lane * 4;  // of this lane's
    const std::int32_t* entry =
        p.block_table + item->request * p.table_stride + tile_begin * 2 + page;
    // Pages are looked up only where a token of this lane's page exists.
    int pages_left = (item->length + 63) / 64 - tile_begin * 2 - page;
    const auto load = [&](int page_id) {
      if (page_id < 0) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      return *reinterpret_cast<const float4*>(p.kv_scale + page_id * p.scale_page_stride +
                                              (lane & 15) * 16);
    };
    const auto page_at = [&](int tile) {
      return tile < tiles_left && tile * 2 < pages_left ? entry[tile * 2] : -1;
    };
    float4 next = load(page_at(0));
    int next_page = page_at(1);
    for (; tiles_left > 0;
         --tiles_left, valid -= kTileTokens, entry += 2, pages_left -= 2, turn.next()) {
      const int buffer = turn.slot();
      float scale[4] = {next.x, next.y, next.z, next.w};
      next = load(next_page);
      next_page = page_at(2);
      float smallest = INFINITY;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!(scale[e] > 0.0f)) scale[e] = __int_as_float(0x7fc00000);
        if (e >= valid) scale[e] = 0.0f;
        if (scale[e] > 0.0f) smallest = fminf(smallest, scale[e]);
      }
      // Lanes 0-15 hold the first 64 tokens, 16-31 the second.
#pragma unroll
      for (int d = 1; d < Traits::kPBlock / 4; d *= 2)
        smallest = fminf(smallest, __shfl_xor_sync(~0u, smallest, d));
      if (smallest == INFINITY) smallest = 1.0f;
      // The factors of two tiles ago are free once the score warps have handed over that tile's P.
      wait(s.p_full[buffer], turn.phase() ^ 1);
      *reinterpret_cast<float4*>(&s.token_scale[buffer][lane * 4]) =
          make_float4(scale[0], scale[1], scale[2], scale[3]);
      // A bad token reaches the rows that see it through its score; those that do not must not meet
      // its NaN here.
      const auto factor = [&](int e) {
        return scale[e] > 0.0f ? __fdividef(smallest, scale[e]) : 0.0f;
      };
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const std::uint32_t two = cvt_f16x2(factor(2 * pair), factor(2 * pair + 1));
        if constexpr (Traits::kTransposedScores) {  // tokens j, j + 8 of each sixteen together
          auto* halves = reinterpret_cast<std::uint16_t*>(s.sum_factors[buffer]);
          const int j = (lane & 1) * 4 + 2 * pair;
          std::uint16_t* at = halves + ((lane >> 2) * 8 + j) * 2 + ((lane >> 1) & 1);
          at[0] = static_cast<std::uint16_t>(two);
          at[2] = static_cast<std::uint16_t>(two >> 16);
        } else {  // [t][n]: tokens 8n + 2t, + 1
          s.sum_factors[buffer][(lane & 1) * 2 + pair][lane >> 1] = two;
        }
      }
      if (lane % (Traits::kPBlock / 4) == 0)
        s.sum_norm[buffer][lane * 4 / Traits::kPBlock] = 1.0f / smallest;
      arrive_warp(s.k_full[buffer][kRopeGroup]);
    }
  }
}

// Two warps: the query of each item into the swizzled image, `rows` of them (a row tile); rows past
// the end become zeros.
template <class Storage>
__device__ void load_query(const DecodeParams& p, Storage& s, PartItems items, int row_begin,
                           int rows) {
  const int first_row = (threadIdx.x & 63) >> 3, unit = threadIdx.x & 7;
  // Rows are eight apart, so that the place in the swizzled row stays the same.
  const std::uint32_t first_to =
      shared_address(s.query[0]) + first_row * 128 + ((unit ^ (first_row & 7)) << 4);
  const RowPlace first_place(row_begin + first_row, p.heads_q);
  for (int n = 0; n < items.count; ++n) {
    const std::int64_t request = items.at(p.plan, n)->request;
    std::uint32_t to = first_to;
    RowPlace place = first_place;
    wait(s.q_empty, static_cast<std::uint32_t>(n + 1) & 1);
#pragma unroll 1
    for (int r = first_row; r < rows; r += 8, to += 8 * 128, place.advance(8, p.heads_q)) {
      const std::uint32_t bytes = row_begin + r < p.rows ? 16 : 0;
      if (bytes == 0) place.token = place.head = 0;  // nothing is read there
      const std::uint8_t* from = p.q_latent + request * p.q_latent_stride.batch +
                                 place.token * p.q_latent_stride.token +
                                 place.head * p.q_latent_stride.head + unit * 16;
#pragma unroll
      for (int c = 0; c < kLatentChunks; ++c)
        cp_async_16(to + c * kQueryChunkBytes, from + c * 128, bytes);
      from = p.q_rope + request * p.q_rope_stride.batch + place.token * p.q_rope_stride.token +
             place.head * p.q_rope_stride.head + unit * 16;
      cp_async_16(to + kRopeChunk * kQueryChunkBytes, from, bytes);
    }
    cp_async_wait_all();
    fence_proxy_async_shared();
    arrive_warp(s.q_full);
  }
}

}  // namespace fp8_decode
}  // namespace snapmla::cuda
