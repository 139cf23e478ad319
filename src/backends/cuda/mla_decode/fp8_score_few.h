// Warpgroup 1 of the FP8 decode kernel for 16 or 32 rows: the scores are computed transposed,
// S^T = K Q^T, so that tokens are the 64 rows of wgmma and its width is no more than the rows there
// are. All four warps share the softmax, where scores of 16 rows would keep a single one busy, and
// the tile is held for less time: with few rows the ring's latency is what limits the bandwidth.
//
// The numbers are those of fp8_score.h by its logits. Thread 32w + 4g + t holds, of token half h,
// tokens 64h + 16w + {g, g + 8} of rows 8n + 2t + {0, 1}: scores[h][4n + {0, 1, 2, 3}] = (g, 0),
// (g, 1), (g + 8, 0), (g + 8, 1). Its row i = 2n + e is 8n + 2t + e.
#pragma once

#include "backends/cuda/mla_decode/fp8_score.h"
#include "backends/cuda/ptx/barrier.h"

namespace snapmla::cuda {
namespace fp8_decode {

template <int kRows>
__device__ __forceinline__ void score_step(float (&d)[kRows / 2], std::uint64_t a, std::uint64_t b,
                                           int accumulate) {
  if constexpr (kRows == 16) wgmma_ss_m64n16k32_e4m3(d, a, b, accumulate);
  if constexpr (kRows == 32) wgmma_ss_m64n32k32_e4m3(d, a, b, accumulate);
}

template <int kRows>
__device__ __forceinline__ void rope_step(float (&d)[kRows / 2], std::uint64_t a, std::uint64_t b) {
  if constexpr (kRows == 16) wgmma_ss_m64n16k16_bf16(d, a, b, 1);
  if constexpr (kRows == 32) wgmma_ss_m64n32k16_bf16(d, a, b, 1);
}

// Issues the score GEMM of one tile; chunks and the rope part in the order of qk_gemm.
template <int kRows, class Storage>
__device__ __forceinline__ void qk_gemm_few(Storage& s, Turn turn, float (&scores)[2][kRows / 2]) {
  constexpr int kOrder[kLatentChunks] = {0, 2, 1, 3};
  constexpr std::uint64_t kStep = 32 >> 4, kHalf = (64 * 128) >> 4;
  const int slot = __shfl_sync(~0u, turn.slot(), 0);
  pin_registers(scores[0]);
  pin_registers(scores[1]);
#pragma unroll
  for (int o = 0; o < kLatentChunks; ++o) {
    const int c = kOrder[o];
    const std::uint64_t a = k_major(shared_address(s.keys[slot][c]));
    const std::uint64_t b = k_major(shared_address(s.query[c]));
    if (o % 2 == 0) wait(s.k_full[slot][o / 2], turn.phase());
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        score_step<kRows>(scores[h], a + h * kHalf + k * kStep, b + k * kStep, o + k > 0);
  }
  const std::uint64_t a = k_major(shared_address(s.keys[slot][kRopeChunk]));
  const std::uint64_t b = k_major(shared_address(s.query[kRopeChunk]));
  wait(s.k_full[slot][kRopeGroup], turn.phase());  // the token factors too
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      rope_step<kRows>(scores[h], a + h * kHalf + k * kStep, b + k * kStep);
  wgmma_commit();
}

// Maximum (or, for finish_few, sum) over the warps of each of this thread's rows; `mine` is the
// same in the eight lanes of a t. One barrier: `at` must not be written again before the next one.
template <int kCount, class Combine>
__device__ __forceinline__ void across_warps(float2 (*at)[4][4], int warp, int g, int t,
                                             float (&mine)[kCount], Combine combine) {
  if (g == 0) {
#pragma unroll
    for (int n = 0; n < kCount / 2; ++n) at[n][t][warp] = make_float2(mine[2 * n], mine[2 * n + 1]);
  }
  barrier_sync(kScoreBarrier, 128);
#pragma unroll
  for (int n = 0; n < kCount / 2; ++n) {
    const float4 low = *reinterpret_cast<const float4*>(at[n][t]);
    const float4 high = *reinterpret_cast<const float4*>(at[n][t] + 2);
    mine[2 * n] = combine(combine(low.x, low.z), combine(high.x, high.z));
    mine[2 * n + 1] = combine(combine(low.y, low.w), combine(high.y, high.w));
  }
}

template <class Traits, class Storage>
__device__ void score_few(const DecodeParams& p, Storage& s, PartItems items, int row_begin) {
  constexpr int kRows = Traits::kRows, kBlocks = Traits::kBlocks;
  constexpr int kMine = kRows / 4;  // rows of this thread
  const int thread = keep(static_cast<int>(threadIdx.x & 127));
  const int warp = thread >> 5, g = (thread & 31) >> 2, t = thread & 3;
  const auto row_of = [&](int i) { return 8 * (i >> 1) + 2 * t + (i & 1); };
  const auto maximum = [](float x, float y) { return fmaxf(x, y); };
  float c[kMine], reference[kMine], sum[kMine];
  Turn turn;
  for (int n = 0; n < items.count; ++n) {
    const DecodeItem* item = items.at(p.plan, n);
    const int length = item->length;
    const std::uint8_t* scales =
        reinterpret_cast<const std::uint8_t*>(p.q_scale) + item->request * p.q_scale_stride.batch;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const std::int64_t offset = s.scale_offset[row_of(i)];
      c[i] = offset < 0 ? 0.0f : *reinterpret_cast<const float*>(scales + offset) * p.scale_log2e;
      reference[i] = kNoReference;
      sum[i] = 0.0f;
    }
    const int all_visible = length - s.hidden[0];  // the first row hides the most
    wait(s.q_full, static_cast<std::uint32_t>(n) & 1);
    int tiles_left = item->tile_end - item->tile_begin;
    int first_token = item->tile_begin * kTileTokens;
    for (; tiles_left > 0; --tiles_left, first_token += kTileTokens, turn.next()) {
      const int slot = turn.slot(), buffer = slot;
      float y[2][kRows / 2];
      qk_gemm_few<kRows>(s, turn, y);
      float scale[2][2];
      std::uint32_t ratio[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = 64 * h + 16 * warp + g;
        scale[h][0] = s.token_scale[buffer][token];
        scale[h][1] = s.token_scale[buffer][token + 8];
        ratio[h] = s.sum_factors[buffer][h * 2 + (warp >> 1)][(warp & 1) * 8 + g];
      }
      float norm[kBlocks];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) norm[b] = s.sum_norm[buffer][b];
      wait(s.p_empty[buffer], turn.phase() ^ 1);
      wgmma_wait<0>();
      pin_registers(y[0]);
      pin_registers(y[1]);
      arrive_warp(s.k_empty[slot][0], s.k_empty[slot][1], s.k_empty[slot][2]);
      if (tiles_left == 1) arrive_warp(s.q_empty);

#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float log = lg2_approx_ftz(scale[h][j]);
#pragma unroll
          for (int i = 0; i < kMine; ++i) {
            float& x = y[h][4 * (i >> 1) + 2 * j + (i & 1)];
            x = fmaf(x * scale[h][j], c[i], log);
          }
        }
      }
      if (first_token + kTileTokens > all_visible) {
        // Tokens that a row must not see: -inf by selection, what stands there may be NaN.
        const int visible = length - first_token - 16 * warp - g;
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          const int end = visible - s.hidden[row_of(i)];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (64 * h >= end) y[h][4 * (i >> 1) + (i & 1)] = -INFINITY;
            if (64 * h + 8 >= end) y[h][4 * (i >> 1) + 2 + (i & 1)] = -INFINITY;
          }
        }
      }
      float m[kBlocks][kMine];  // NaN does not count
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          m[b][i] = -INFINITY;
#pragma unroll
          for (int h = b; h < (kBlocks == 1 ? 2 : b + 1); ++h)
            m[b][i] = fmaxf(m[b][i],
                            fmaxf(y[h][4 * (i >> 1) + (i & 1)], y[h][4 * (i >> 1) + 2 + (i & 1)]));
#pragma unroll
          for (int d = 4; d < 32; d *= 2)
            m[b][i] = fmaxf(m[b][i], __shfl_xor_sync(~0u, m[b][i], d));
        }
        across_warps(s.across[buffer][b], warp, g, t, m[b], maximum);
      }
      // The references; every thread of a row comes to the same.
      bool moved = false;
      float rescale[kMine];
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const float tile_maximum = fmaxf(m[0][i], m[kBlocks - 1][i]);
        const float next = tile_maximum > reference[i] + 40.0f ? tile_maximum : reference[i];
        rescale[i] = ex2_approx_ftz(reference[i] - next);
        moved = moved || (next != reference[i] && reference[i] != kNoReference);
        sum[i] *= rescale[i];
        reference[i] = next;
      }
      moved = __any_sync(~0u, moved);
      float shift[kBlocks][kMine], sigma[kBlocks][kMine];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          shift[b][i] =
              m[b][i] == -INFINITY ? 0.0f : m[b][i] - 8.80735492205760410744f;  // log2 448
          sigma[b][i] = ex2_approx_ftz(m[b][i] - reference[i]) * (1.0f / 448.0f);
        }
      }
      if (thread < 4) {  // the four lanes g = 0 of warp 0 have all rows
#pragma unroll
        for (int i = 0; i < kMine; i += 2) {
          const int at = t * 20 + i;  // row_float(row_of(i))
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
            *reinterpret_cast<float2*>(&s.sigma[buffer][b][at]) =
                make_float2(sigma[b][i], sigma[b][i + 1]);
          if (moved)
            *reinterpret_cast<float2*>(&s.rescale[buffer][at]) =
                make_float2(rescale[i], rescale[i + 1]);
        }
        if (t == 0) s.rescale_flags[buffer] = moved ? 0x01010101u : 0u;
      }
      // P: bytes of tokens g, g + 8 of two rows; lanes g and g ^ 1 swap, so that each has one row's
      // word of tokens 2q, 2q + 1, 2q + 8, 2q + 9 (the order that load_values gives V).
      std::uint32_t part[kBlocks][kMine];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int b = h * kBlocks / 2;
#pragma unroll
        for (int i = 0; i < kMine; i += 2) {
          const float* x = &y[h][2 * i];
          const std::uint32_t codes = cvt_e4m3x4(
              ex2_approx_ftz(x[0] - shift[b][i]), ex2_approx_ftz(x[2] - shift[b][i]),
              ex2_approx_ftz(x[1] - shift[b][i + 1]), ex2_approx_ftz(x[3] - shift[b][i + 1]));
          std::uint32_t even, odd;
          cvt_f16x4_from_e4m3x4(codes, even, odd);
          const bool begins = h == 0 || kBlocks == 2;
          part[b][i] = fma_f16x2(even, ratio[h], begins ? 0u : part[b][i]);
          part[b][i + 1] = fma_f16x2(odd, ratio[h], begins ? 0u : part[b][i + 1]);
          const std::uint32_t other = __shfl_xor_sync(~0u, codes, 4);
          const int row = row_of(i) + (g & 1);
          const std::uint32_t at = static_cast<std::uint32_t>(
              row * 128 + (((h * 4 + warp) ^ (row & 7)) << 4) + 4 * (g >> 1));
          *reinterpret_cast<std::uint32_t*>(&s.p[buffer][at]) =
              __byte_perm(codes, other, (g & 1) ? 0x3726 : 0x5140);
        }
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          const float2 f = cvt_f32x2_from_f16x2(part[b][i]);
          sum[i] = fmaf(f.x + f.y, sigma[b][i] * norm[b], sum[i]);
        }
      }
      fence_proxy_async_shared();
      arrive_warp(s.p_full[buffer]);
    }
    // l over lanes and warps; the lanes g = 0 of warp 0 write 1 / l and lse.
#pragma unroll
    for (int i = 0; i < kMine; ++i)
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], d);
    // An item has a tile, so that a barrier lies between this use and the one before.
    across_warps(s.across_sum, warp, g, t, sum, [](float x, float y) { return x + y; });
    if (thread < 4) {
#pragma unroll
      for (int i = 0; i < kMine; ++i)
        finish_row(p, s, item, n & 3, sum[i], reference[i], row_of(i), row_begin);
    }
    arrive_warp(s.l_full[n & 1]);
  }
}

}  // namespace fp8_decode
}  // namespace snapmla::cuda
