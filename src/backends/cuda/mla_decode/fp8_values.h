// Warpgroups 2 and 3 of the FP8 decode kernel: O^T = V^T P^T and the output.
#pragma once

#include "backends/cuda/mla_decode/fp8_store.h"
#include "backends/cuda/ptx/barrier.h"
#include "backends/cuda/ptx/convert.h"
#include "backends/cuda/ptx/fence.h"
#include "backends/cuda/ptx/matrix.h"
#include "backends/cuda/ptx/wgmma_fp8.h"

namespace snapmla::cuda {
namespace fp8_decode {

template <int kRows>
__device__ __forceinline__ void pv_step(float (&d)[kRows / 2], const std::uint32_t (&a)[4],
                                        std::uint64_t b, int accumulate) {
  if constexpr (kRows == 16) wgmma_rs_m64n16k32_e4m3(d, a, b, accumulate);
  if constexpr (kRows == 32) wgmma_rs_m64n32k32_e4m3(d, a, b, accumulate);
  if constexpr (kRows == 64) wgmma_rs_m64n64k32_e4m3(d, a, b, accumulate);
}

// V^T fragments of 16 dims x 64 tokens per warp. One 16-bit element of the transposing load holds
// dims 2g, 2g + 1 of a token; the permutes part them: M row g is dim 2g, row g + 8 dim 2g + 1. The
// order of tokens along k is 0 1 8 9 2 3 10 11 ..., which is how the score warps pack P.
__device__ __forceinline__ void load_values(std::uint32_t address, std::uint32_t (&a)[2][4]) {
  std::uint32_t r[2][4];
  ldmatrix_x4_trans(address, r[0]);
  ldmatrix_x4_trans(address + 32 * 128, r[1]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    a[h][0] = __byte_perm(r[h][0], r[h][1], 0x6420);
    a[h][1] = __byte_perm(r[h][0], r[h][1], 0x7531);
    a[h][2] = __byte_perm(r[h][2], r[h][3], 0x6420);
    a[h][3] = __byte_perm(r[h][2], r[h][3], 0x7531);
  }
}

// 0 for every e4m3 byte that is NaN.
__device__ __forceinline__ std::uint32_t drop_nan(std::uint32_t codes) {
  const std::uint32_t nan = ((codes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
  return codes & ~((nan >> 7) * 0xffu);
}

// P = 0 does not stop a NaN in V. In a tile that some row must not see to its end, this half's dims
// become 0 for tokens past the end of the request (`valid` of the tile exist; the others hold
// anything), and NaN codes become 0 for tokens that only some rows see: the rows that do are NaN
// through their scores already. Comes after P, hence after QK has read the tile.
template <class Storage>
__device__ __noinline__ void clear_tail(Storage& s, Turn turn, int half, int visible, int valid) {
  const int thread = threadIdx.x & 127;
  wait(s.p_full[turn.slot()], turn.phase());
  for (int c = half * 2; c < half * 2 + 2; ++c) {
    wait(s.k_full[turn.slot()][c & 1], turn.phase());
    auto* units = reinterpret_cast<uint4*>(s.keys[turn.slot()][c]);
    for (int u = max(visible, 0) * 8 + thread; u < kTileTokens * 8; u += 128) {
      uint4 x = u < valid * 8 ? units[u] : make_uint4(0, 0, 0, 0);
      units[u] = make_uint4(drop_nan(x.x), drop_nan(x.y), drop_nan(x.z), drop_nan(x.w));
    }
  }
  fence_proxy_async_shared();  // the next copy into this slot must come after these writes
  barrier_sync(1 + half, 128);
}

// The first wgmma of a block overwrites T, so that T need not be set before; the compiler cannot
// know that.
#pragma nv_diag_suppress 549
// One tile: four blocks of 64 dims, each one accumulator T of 64 dims x kRows rows. The fragments
// of the next half block are loaded while a wgmma runs.
template <class Traits, class Storage>
__device__ __forceinline__ void pv_tile(Storage& s, int slot, std::uint32_t phase, int half,
                                        std::uint32_t lane_at, int t,
                                        float (&o)[4][Traits::kRows / 2]) {
  constexpr int kRows = Traits::kRows;
  const int buffer = slot;
  const std::uint32_t keys = shared_address(s.keys[slot][half * 2]) + lane_at;
  const std::uint64_t p_operand = k_major(shared_address(s.p[buffer]));
  // Dims 64 m .. 64 m + 63 of this half: chunk m / 2; the 16-byte unit of a warp is 4 (m % 2) +
  // warp, swizzled, so that odd m differ from even m in bit 6 of the address.
  const auto at = [&](int m, int token) {
    return ((keys + (m >> 1) * kChunkBytes) ^ ((m & 1) << 6)) + token * 128;
  };
  float acc[kRows / 2];
  // O += sigma T. Half of the factors are loaded before the wait for T, into the registers of the
  // fragments that are free by then: shared memory answers slowly beside wgmma.
  constexpr int kEarly = kRows / 16;
  float4 early[(kEarly + 1) / 2];
  const auto sigma_at = [&](int block, int n) {
    return *reinterpret_cast<const float4*>(s.sigma[buffer][block] + t * 20 + n * 2);
  };
  const auto load_sigma = [&](int block) {
#pragma unroll
    for (int n = 0; n < kEarly; n += 2) early[n / 2] = sigma_at(block, n);
  };
  const auto promote = [&](int m, int block) {
    const auto add = [&](int n, float f0, float f1) {
      o[m][4 * n + 0] = fmaf(acc[4 * n + 0], f0, o[m][4 * n + 0]);
      o[m][4 * n + 1] = fmaf(acc[4 * n + 1], f1, o[m][4 * n + 1]);
      o[m][4 * n + 2] = fmaf(acc[4 * n + 2], f0, o[m][4 * n + 2]);
      o[m][4 * n + 3] = fmaf(acc[4 * n + 3], f1, o[m][4 * n + 3]);
    };
#pragma unroll
    for (int n = 0; n < kRows / 8; n += 2) {
      const float4 f = n < kEarly ? early[n / 2] : sigma_at(block, n);
      add(n, f.x, f.y);
      add(n + 1, f.z, f.w);
    }
  };
  // PERF: before the first promotion, not before the first wgmma, which it would hold up; but ptxas
  // takes no branch between the wgmmas of two P blocks.
  const auto rescale = [&] {
    const std::uint32_t moved = s.rescale_flags[buffer];
    if (moved == 0) return;
    for_row_factors<kRows>(s.rescale[buffer], t, [&](int n, float f0, float f1) {
      if ((moved >> (n >> 1) * 8 & 0xff) == 0) return;  // this score warp wrote no factors
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        o[m][4 * n + 0] *= f0;
        o[m][4 * n + 1] *= f1;
        o[m][4 * n + 2] *= f0;
        o[m][4 * n + 3] *= f1;
      }
    });
  };
  // Two fragment buffers of 64 tokens take turns: while one feeds wgmma, the other is loaded; sigma
  // borrows the registers of the first before the promotion.
  std::uint32_t values[2][2][4];
  wait(s.k_full[slot][0], phase);
  load_values(at(0, 0), values[0]);
  wait(s.p_full[buffer], phase);
  if constexpr (Traits::kBlocks == 2) rescale();
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    std::uint32_t(&a)[2][4] = values[m & 1];
    std::uint32_t(&b)[2][4] = values[1 - (m & 1)];
    wgmma_fence();
    pv_step<kRows>(acc, a[0], p_operand, 0);
    pv_step<kRows>(acc, a[1], p_operand + 2, 1);
    wgmma_commit();
    load_values(at(m, 64), b);
    if constexpr (Traits::kBlocks == 2) {  // a P block of 64 tokens: T is promoted after each
      load_sigma(0);
      wgmma_wait<0>();
      pin_registers(acc);
      promote(m, 0);
    }
    wgmma_fence();
    pv_step<kRows>(acc, b[0], p_operand + 4, Traits::kBlocks == 1);
    pv_step<kRows>(acc, b[1], p_operand + 6, 1);
    wgmma_commit();
    if (m == 1) arrive_warp(s.k_empty[slot][0]);
    if (m == 3) arrive_warp(s.k_empty[slot][1]);
    if constexpr (Traits::kBlocks == 1) {
      if (m == 0) rescale();
      wgmma_wait<1>();
    }
    load_sigma(Traits::kBlocks - 1);
    if (m == 1) wait(s.k_full[slot][1], phase);
    wgmma_wait<0>();
    pin_registers(acc);
    if (m < 3) load_values(at(m + 1, 0), b);
    promote(m, Traits::kBlocks - 1);
  }
}

#pragma nv_diag_default 549

template <class Traits, class Storage>
__device__ void accumulate_values(const DecodeParams& p, Storage& s, PartItems items, int row_begin,
                                  int half) {
  constexpr int kRows = Traits::kRows;
  const int thread = keep(static_cast<int>(threadIdx.x & 127));
  const auto lane_at =
      static_cast<std::uint32_t>((thread & 31) * 128 + (((thread >> 5) ^ (thread & 7)) << 4));
  Turn turn;
  float o[4][kRows / 2];
  for (int n = 0; n < items.count; ++n) {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int k = 0; k < kRows / 2; ++k) o[m][k] = 0.0f;
    const DecodeItem* item = items.at(p.plan, n);  // read again later: registers are short
    for (int tiles_left = item->tile_end - item->tile_begin; tiles_left > 0; --tiles_left) {
      if (tiles_left <= 2) {  // seqlen_q is at most 16: no other tile can need it
        const int first_token = (item->tile_end - tiles_left) * kTileTokens;
        const int visible = item->length - s.hidden[0] - first_token;
        if (visible < kTileTokens) clear_tail(s, turn, half, visible, item->length - first_token);
      }
      pv_tile<Traits>(s, turn.slot(), turn.phase(), half, lane_at, thread & 3, o);
      // Before P's buffer is given back: the score warps could otherwise be two items ahead, and
      // the phase ambiguous.
      if (tiles_left == 1) wait(s.l_full[n & 1], static_cast<std::uint32_t>(n >> 1) & 1);
      arrive_warp(s.p_empty[turn.slot()]);
      turn.next();
    }
    const float* factors = s.inverse_sum[n & 3];
    if (item->slot >= 0) {
      if (!merge_splits<Traits>(p, s, *item, o, half, row_begin)) continue;
      factors = s.merge_weight[half][kMergeSplits];  // ones: the weights are in `o`
    }
    store_rows<Traits>(p, s, *item, o, factors, half, row_begin);
  }
}

}  // namespace fp8_decode
}  // namespace snapmla::cuda
