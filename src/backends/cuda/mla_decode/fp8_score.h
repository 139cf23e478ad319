// Warpgroup 1 of the FP8 decode kernel: scores, online softmax, P. For more than 32 rows; see
// fp8_score_few.h for fewer.
#pragma once

#include "backends/cuda/mla_decode/fp8_storage.h"
#include "backends/cuda/mla_decode/fragments.h"
#include "backends/cuda/ptx/convert.h"
#include "backends/cuda/ptx/fence.h"
#include "backends/cuda/ptx/math.h"
#include "backends/cuda/ptx/matrix.h"
#include "backends/cuda/ptx/wgmma_fp8.h"

namespace snapmla::cuda {
namespace fp8_decode {

// Issues the score GEMM of one tile; the caller waits for it.
template <class Storage>
__device__ __forceinline__ void qk_gemm(Storage& s, Turn turn, float (&scores)[64]) {
  constexpr int kOrder[kLatentChunks] = {0, 2, 1, 3};
  constexpr std::uint64_t kStep = 32 >> 4;  // one k step inside the swizzled row
  // PERF: through a shuffle the compiler sees that the slot is uniform and forms descriptors on the
  // uniform datapath, 5 instructions fewer per wgmma: 790 -> 820 TFLOP/s at 128 rows on an H200.
  const int slot = __shfl_sync(~0u, turn.slot(), 0);
  pin_registers(scores);
#pragma unroll
  for (int o = 0; o < kLatentChunks; ++o) {
    const int c = kOrder[o];
    const std::uint64_t a = k_major(shared_address(s.query[c]));
    const std::uint64_t b = k_major(shared_address(s.keys[slot][c]));
    if (o % 2 == 0) wait(s.k_full[slot][o / 2], turn.phase());
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma_ss_m64n128k32_e4m3(scores, a + k * kStep, b + k * kStep, o + k > 0);
  }
  // The rope part last: it may be much larger than the latent part, and FP8 products added under a
  // large accumulator would lose bits; BF16 ones do not.
  const std::uint64_t a = k_major(shared_address(s.query[kRopeChunk]));
  const std::uint64_t b = k_major(shared_address(s.keys[slot][kRopeChunk]));
  wait(s.k_full[slot][kRopeGroup], turn.phase());  // the token factors too
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_ss_m64n128k16_bf16(scores, a + k * kStep, b + k * kStep, 1);
  wgmma_commit();
}

// What a score lane keeps. Its rows are g and g + 8 of the warp's 16.
struct ScoreLane {
  int t;                       // lane % 4: columns 8n + 2t, + 1
  int row_at;                  // row_float(g's row)
  std::uint32_t store_at;      // of stmatrix: row (lane % 16) * 128, and
  int store_unit;              // its 16-byte unit, before the swizzle of that row
  float c[2];                  // q_scale softmax_scale log2 e
  float reference[2], sum[2];  // R; l of this lane's columns
};

template <class Storage>
__device__ __forceinline__ float2 token_scales(Storage& s, int buffer, int n, int t) {
  return *reinterpret_cast<const float2*>(&s.token_scale[buffer][8 * n + 2 * t]);
}

// y of one P block, in place. The token scales come from shared memory, which answers slowly beside
// the tensor cores (its port is the scarcest resource of the kernel): the first eight pairs are
// loaded while QK runs (`f`), the others eight steps ahead, and log2 s is computed rather than
// loaded.
template <class Traits, class Storage>
__device__ __forceinline__ void scale_block(Storage& s, int buffer, int block, float (&y)[64],
                                            float2 (&f)[8], const ScoreLane& lane) {
  constexpr int kSteps = Traits::kPBlock / 8;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int n = block * kSteps + i;
    const float2 g = f[n & 7];
    if (n + 8 < kTileTokens / 8) f[n & 7] = token_scales(s, buffer, n + 8, lane.t);
    const float log0 = lg2_approx_ftz(g.x), log1 = lg2_approx_ftz(g.y);
    y[4 * n + 0] = fmaf(y[4 * n + 0] * g.x, lane.c[0], log0);
    y[4 * n + 1] = fmaf(y[4 * n + 1] * g.y, lane.c[0], log1);
    y[4 * n + 2] = fmaf(y[4 * n + 2] * g.x, lane.c[1], log0);
    y[4 * n + 3] = fmaf(y[4 * n + 3] * g.y, lane.c[1], log1);
  }
}

// Tokens that a row must not see: -inf by selection, what stands there may be NaN.
template <class Traits, class Storage>
__device__ __forceinline__ void mask_block(Storage& s, int block, float (&y)[64], int first_token,
                                           int row, const ScoreLane& lane) {
  constexpr int kSteps = Traits::kPBlock / 8;
  const int visible0 = s.row_visible[row] - first_token - 2 * lane.t;
  const int visible1 = s.row_visible[row + 8] - first_token - 2 * lane.t;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int n = block * kSteps + i;
    if (8 * n >= visible0) y[4 * n + 0] = -INFINITY;
    if (8 * n + 1 >= visible0) y[4 * n + 1] = -INFINITY;
    if (8 * n >= visible1) y[4 * n + 2] = -INFINITY;
    if (8 * n + 1 >= visible1) y[4 * n + 3] = -INFINITY;
  }
}

// Maximum of both rows over one P block; -inf where no token counts (NaN does not).
template <class Traits>
__device__ __forceinline__ void block_maximum(int block, const float (&y)[64], float (&m)[2]) {
  constexpr int kSteps = Traits::kPBlock / 8;
  m[0] = m[1] = -INFINITY;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int n = block * kSteps + i;
    m[0] = fmaxf(m[0], fmaxf(y[4 * n + 0], y[4 * n + 1]));
    m[1] = fmaxf(m[1], fmaxf(y[4 * n + 2], y[4 * n + 3]));
  }
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
    const float other0 = __shfl_xor_sync(~0u, m[0], d), other1 = __shfl_xor_sync(~0u, m[1], d);
    m[0] = fmaxf(m[0], other0);
    m[1] = fmaxf(m[1], other1);
  }
}

// Moves the references of both rows if the tile's maximum asks for it. Returns whether a row moved
// after the item's first tile: PV must then rescale O. (The rule looks at tiles, not P blocks: R
// only keeps the f32 range, no bit of P depends on it.)
template <class Storage>
__device__ __forceinline__ bool move_reference(Storage& s, int buffer, const float (&m)[2],
                                               ScoreLane& lane) {
  float rescale[2];
  bool moved = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float reference = m[r] > lane.reference[r] + 40.0f ? m[r] : lane.reference[r];
    rescale[r] = ex2_approx_ftz(lane.reference[r] - reference);
    moved = moved || (reference != lane.reference[r] && lane.reference[r] != kNoReference);
    lane.sum[r] *= rescale[r];
    lane.reference[r] = reference;
  }
  moved = __any_sync(~0u, moved);
  if (moved && lane.t == 0) {
    s.rescale[buffer][lane.row_at] = rescale[0];
    s.rescale[buffer][lane.row_at + 2] = rescale[1];  // row + 8
  }
  return moved;
}

// y of one P block becomes P, which goes to shared memory with its sigma; l grows by the sum of
// what P became.
template <class Traits, class Storage>
__device__ __forceinline__ void quantize_block(Storage& s, int buffer, int block,
                                               const float (&y)[64], const float (&m)[2],
                                               ScoreLane& lane) {
  constexpr int kSteps = Traits::kPBlock / 8;
  const int n0 = block * kSteps;
  float sigma[2], shift[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    shift[r] = m[r] == -INFINITY ? 0.0f : m[r] - 8.80735492205760410744f;  // log2 448
    sigma[r] = ex2_approx_ftz(m[r] - lane.reference[r]) * (1.0f / 448.0f);
  }
  if (lane.t == 0) {
    s.sigma[buffer][block][lane.row_at] = sigma[0];
    s.sigma[buffer][block][lane.row_at + 2] = sigma[1];
  }
  float sum[2] = {0.0f, 0.0f};
  std::uint32_t part[2] = {0u, 0u};
#pragma unroll
  for (int i = 0; i < kSteps; i += 4) {  // 32 tokens: two 16-byte units of a P row
    const int n = n0 + i;
    const uint4 ratio4 = *reinterpret_cast<const uint4*>(&s.sum_factors[buffer][lane.t][n]);
    const std::uint32_t ratio[4] = {ratio4.x, ratio4.y, ratio4.z, ratio4.w};
    std::uint32_t words[4];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* x = &y[4 * (n + 2 * pair) + 2 * r];  // columns 8n + 2t, + 1, + 8, + 9
        const std::uint32_t codes =
            cvt_e4m3x4(ex2_approx_ftz(x[0] - shift[r]), ex2_approx_ftz(x[1] - shift[r]),
                       ex2_approx_ftz(x[4] - shift[r]), ex2_approx_ftz(x[5] - shift[r]));
        std::uint32_t low, high;
        cvt_f16x4_from_e4m3x4(codes, low, high);
        part[r] = fma_f16x2(low, ratio[2 * pair], part[r]);
        part[r] = fma_f16x2(high, ratio[2 * pair + 1], part[r]);
        words[2 * pair + r] = codes;
      }
    }
    stmatrix_x4(lane.store_at + buffer * 8192 + (((n >> 1) ^ lane.store_unit) << 4), words);
    if (i % 8 == 4) {  // f16 holds the sum of 8 x 448 with 11 bits; more would cost precision
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 f = cvt_f32x2_from_f16x2(part[r]);
        sum[r] += f.x + f.y;
        part[r] = 0u;
      }
    }
  }
  const float norm = s.sum_norm[buffer][block];
  lane.sum[0] = fmaf(sum[0], sigma[0] * norm, lane.sum[0]);
  lane.sum[1] = fmaf(sum[1], sigma[1] * norm, lane.sum[1]);
}

// lse of a finished row, and 1 / l for the PV warps; of a split R and l.
template <class Storage>
__device__ __forceinline__ void finish_row(const DecodeParams& p, Storage& s,
                                           const DecodeItem* item, int buffer, float l,
                                           float reference, int row, int row_begin) {
  const std::int64_t offset = s.lse_offset[row];
  if (item->slot >= 0) {
    if (offset >= 0) *row_state(p, item->slot, row_begin + row) = {reference, l};
    return;
  }
  s.inverse_sum[buffer][row_float(row)] = l == 0.0f ? 0.0f : 1.0f / l;
  if (p.lse && offset >= 0) {
    p.lse[item->request * p.lse_batch_stride + offset] =
        l == 0.0f ? -INFINITY : (reference + log2f(l)) * 0.69314718055994530942f;
  }
}

template <class Storage>
__device__ __noinline__ void finish_rows(const DecodeParams& p, Storage& s, const DecodeItem* item,
                                         int buffer, float sum0, float sum1, float reference0,
                                         float reference1, int row, int row_begin) {
  const float sums[2] = {sum0, sum1}, references[2] = {reference0, reference1};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float l = sums[r];
    l += __shfl_xor_sync(~0u, l, 1);
    l += __shfl_xor_sync(~0u, l, 2);
    if ((threadIdx.x & 3) == 0)
      finish_row(p, s, item, buffer, l, references[r], row + 8 * r, row_begin);
  }
}

// Row constants of an item; the number of keys each row sees goes to shared memory.
template <class Storage>
__device__ __forceinline__ void begin_rows(const DecodeParams& p, Storage& s, int request,
                                           int length, int row, ScoreLane& lane) {
  const std::uint8_t* scales =
      reinterpret_cast<const std::uint8_t*>(p.q_scale) + request * p.q_scale_stride.batch;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::int64_t offset = s.scale_offset[row + 8 * r];
    lane.c[r] =
        offset < 0 ? 0.0f : *reinterpret_cast<const float*>(scales + offset) * p.scale_log2e;
    lane.reference[r] = kNoReference;
    lane.sum[r] = 0.0f;
    if (lane.t == 0) s.row_visible[row + 8 * r] = max(0, length - s.hidden[row + 8 * r]);
  }
  __syncwarp();
}

template <class Traits, class Storage>
__device__ void score(const DecodeParams& p, Storage& s, PartItems items, int row_begin) {
  const int thread = keep(static_cast<int>(threadIdx.x & 127));
  const int row = (thread >> 5) * 16 + ((thread & 31) >> 2);
  const int store_row = (thread >> 5) * 16 + (thread & 15);
  ScoreLane lane;
  lane.t = thread & 3;
  lane.row_at = row_float(row);
  lane.store_at = shared_address(s.p[0]) + store_row * 128;
  lane.store_unit = ((thread & 31) >> 4) ^ (store_row & 7);
  const bool active = (thread >> 5) * 16 < Traits::kRows;
  Turn turn;
  for (int n = 0; n < items.count; ++n) {
    const DecodeItem* item = items.at(p.plan, n);
    begin_rows(p, s, item->request, item->length, row, lane);
    // The first token that some row of this CTA must not see: its first row hides the most.
    const int all_visible = item->length - s.hidden[0];
    wait(s.q_full, static_cast<std::uint32_t>(n) & 1);
    int tiles_left = item->tile_end - item->tile_begin;
    int first_token = item->tile_begin * kTileTokens;
    for (; tiles_left > 0; --tiles_left, first_token += kTileTokens, turn.next()) {
      const int slot = turn.slot(), buffer = slot;
      float scores[64];
      qk_gemm(s, turn, scores);
      float2 f[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) f[n] = token_scales(s, buffer, n, lane.t);
      wait(s.p_empty[buffer], turn.phase() ^ 1);
      wgmma_wait<0>();
      pin_registers(scores);
      arrive_warp(s.k_empty[slot][0], s.k_empty[slot][1], s.k_empty[slot][2]);
      if (tiles_left == 1) arrive_warp(s.q_empty);
      if (active) {
        const bool masked = first_token + kTileTokens > all_visible;
        float m[Traits::kBlocks][2];
#pragma unroll
        for (int block = 0; block < Traits::kBlocks; ++block) {
          scale_block<Traits>(s, buffer, block, scores, f, lane);
          if (masked) mask_block<Traits>(s, block, scores, first_token, row, lane);
          block_maximum<Traits>(block, scores, m[block]);
        }
        const float tile_maximum[2] = {fmaxf(m[0][0], m[Traits::kBlocks - 1][0]),
                                       fmaxf(m[0][1], m[Traits::kBlocks - 1][1])};
        const bool moved = move_reference(s, buffer, tile_maximum, lane);
#pragma unroll
        for (int block = 0; block < Traits::kBlocks; ++block)
          quantize_block<Traits>(s, buffer, block, scores, m[block], lane);
        if ((thread & 31) == 0)
          reinterpret_cast<std::uint8_t*>(&s.rescale_flags[buffer])[thread >> 5] = moved ? 1 : 0;
        fence_proxy_async_shared();
      }
      arrive_warp(s.p_full[buffer]);
    }
    // After the last P, so that PV need not wait for it.
    if (active)
      finish_rows(p, s, items.at(p.plan, n), n & 3, lane.sum[0], lane.sum[1], lane.reference[0],
                  lane.reference[1], row, row_begin);
    arrive_warp(s.l_full[n & 1]);
  }
}

}  // namespace fp8_decode
}  // namespace snapmla::cuda
