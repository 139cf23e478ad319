// Warpgroup 1 of the FP8 decode kernel: scores, online softmax, P. For more than 32 rows; see
// fp8_score_few.h for fewer.
//
// P'_ij = 448 2^(y_ij - m_i) is made of e_ij = s_k[j] 2^(S~_ij s_k[j] c_i) = 2^y_ij and the largest
// of them: the exponentials need not wait for the maximum, and their unit works beside everything
// else. That is the same to rounding as long as 2^m and l stay well within f32; R is 0 then. From
// the tile of an item on where a row's do not (logits of more than 62, natural log, or less than
// -41 in its first tile) the warpgroup goes on by logits to the item's end: y, then m, then 2^(y -
// m), with a reference for each row.
#pragma once

#include "backends/cuda/mla_decode/fp8_storage.h"
#include "backends/cuda/mla_decode/fragments.h"
#include "backends/cuda/ptx/barrier.h"
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

inline constexpr int kScoreBarrier = 3;  // named barrier of this warpgroup

// The lane's first row, of which it keeps no register.
__device__ __forceinline__ int first_row() {
  return static_cast<int>(threadIdx.x >> 5 & 3) * 16 + static_cast<int>(threadIdx.x >> 2 & 7);
}

// What a score lane keeps. Its rows are g and g + 8 of the warp's 16.
struct ScoreLane {
  int t;                   // lane % 4: columns 8n + 2t, + 1
  int row_at;              // row_float(g's row)
  std::uint32_t store_at;  // of stmatrix: row (lane % 16) * 128, and
  int store_unit;          // its 16-byte unit, before the swizzle of that row
  float c[2];              // q_scale softmax_scale log2 e
  float sum[2];            // l of this lane's columns
};

// R and l of a lane's rows, l of its columns.
struct RowSums {
  float reference[2], sum[2];
};

// What 2^m may be for the exponentials to come first. R is 0 then, and m between -60 and 90; where
// logits come first m is between R and R + 40. Partial results are weighted by 2^(R - the largest
// R), which vanishes from 126 binades on: by then what is lost is 24 binades smaller at least (m <
// -86 beside -60, or 90 beside 126).
inline constexpr float kLargestExponential = 0x1p90f, kSmallestExponential = 0x1p-60f;
inline constexpr float kVanishing = 0x1p-115f;  // a block of less adds nothing to what is there

template <class Storage>
__device__ __forceinline__ float2 token_scales(Storage& s, int buffer, int n, int t) {
  return *reinterpret_cast<const float2*>(&s.token_scale[buffer][8 * n + 2 * t]);
}

// Scores of one P block become e, in place; m: the largest of each row's here (NaN does not count).
// The token scales come from shared memory, which answers slowly beside the tensor cores (its port
// is the scarcest resource of the kernel): the first eight pairs are loaded while QK runs (`f`),
// the others eight steps ahead. PERF: two multiplications are quicker than a multiply-add with a
// third register or a logarithm.
template <class Traits, class Storage>
__device__ __forceinline__ void exponential_block(Storage& s, int buffer, int block, float (&y)[64],
                                                  float2 (&f)[8], const ScoreLane& lane,
                                                  float (&m)[2]) {
  constexpr int kSteps = Traits::kPBlock / 8;
  float most[2][2] = {};
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int n = block * kSteps + i;
    const float2 g = f[n & 7];
    if (n + 8 < kTileTokens / 8) f[n & 7] = token_scales(s, buffer, n + 8, lane.t);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float scale = e & 1 ? g.y : g.x;
      float& x = y[4 * n + e];
      x = scale * ex2_approx_ftz(x * scale * lane.c[e >> 1]);
      most[e >> 1][e & 1] = fmaxf(most[e >> 1][e & 1], x);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) m[r] = fmaxf(most[r][0], most[r][1]);
}

// The e of tokens that a row must not see become 0, by selection: what stands there may be NaN. The
// maxima once more. `visible`: tokens of the tile that all rows of the CTA see.
// PERF: after exponential_block, which is right for the tokens before: with a second form of it
// that leaves the others out, ptxas takes the scores' descriptors from the uniform registers.
template <class Traits, class Storage>
__device__ __forceinline__ void mask_block(Storage& s, int block, int visible, float (&y)[64],
                                           const ScoreLane& lane, float (&m)[2]) {
  constexpr int kSteps = Traits::kPBlock / 8;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int seen = visible + s.seen_more[lane.row_at + 2 * r] - 2 * lane.t;
    m[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int n = block * kSteps + i;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = y[4 * n + 2 * r + e];
        if (8 * n + e >= seen) x = 0.0f;
        m[r] = fmaxf(m[r], x);
      }
    }
  }
}

// Over the four lanes of a row.
__device__ __forceinline__ void quad_maximum(float (&m)[2]) {
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
    const float other0 = __shfl_xor_sync(~0u, m[0], d), other1 = __shfl_xor_sync(~0u, m[1], d);
    m[0] = fmaxf(m[0], other0);
    m[1] = fmaxf(m[1], other1);
  }
}

// Whether both rows' exponentials are good, and l, which takes them over the tokens' scales: `norm`
// is 1 over the smallest. Small ones are good where larger ones came before (`first`: none did).
__device__ __forceinline__ bool within(const float (&m)[2], float norm, bool first) {
  const float least = first ? kSmallestExponential : 0.0f;
  bool good = true;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    good = good && m[r] >= least && fmaxf(m[r], m[r] * norm) <= kLargestExponential;
  return good;
}

// Of the 32 tokens from 8n on, those of columns t.
template <class Storage>
__device__ __forceinline__ uint4 sum_factors(Storage& s, int buffer, int n, int t) {
  return *reinterpret_cast<const uint4*>(&s.sum_factors[buffer][t][n]);
}

// e of one P block becomes P = e gain, which goes to shared memory with its sigma; l grows by the
// sum of what P became.
template <class Traits, class Storage>
__device__ __forceinline__ void quantize_block(Storage& s, int buffer, int block,
                                               const float (&e)[64], const float (&gain)[2],
                                               const float (&sigma)[2], uint4 (&ratios)[2],
                                               float norm, const ScoreLane& lane, float (&l)[2]) {
  constexpr int kSteps = Traits::kPBlock / 8;
  const int n0 = block * kSteps;
  if (lane.t == 0) {
    s.sigma[buffer][block][lane.row_at] = sigma[0];
    s.sigma[buffer][block][lane.row_at + 2] = sigma[1];
  }
  float sum[2] = {0.0f, 0.0f};
  std::uint32_t part[2] = {0u, 0u};
#pragma unroll
  for (int i = 0; i < kSteps; i += 4) {  // 32 tokens: two 16-byte units of a P row
    const int n = n0 + i;
    uint4 four;
    if constexpr (Traits::kBlocks == 1) {
      four = ratios[n / 4 & 1];
      if (n + 8 < kTileTokens / 8) ratios[n / 4 & 1] = sum_factors(s, buffer, n + 8, lane.t);
    } else {  // registers are shorter
      four = sum_factors(s, buffer, n, lane.t);
    }
    const std::uint32_t ratio[4] = {four.x, four.y, four.z, four.w};
    std::uint32_t words[4];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* x = &e[4 * (n + 2 * pair) + 2 * r];  // columns 8n + 2t, + 1, + 8, + 9
        const std::uint32_t codes =
            cvt_e4m3x4(x[0] * gain[r], x[1] * gain[r], x[4] * gain[r], x[5] * gain[r]);
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
  l[0] = fmaf(sum[0], sigma[0] * norm, l[0]);
  l[1] = fmaf(sum[1], sigma[1] * norm, l[1]);
}

// Whether this warp moved references in this tile: PV must then rescale O. `row_at`: of the
// lane's first row; in lane 0 of warp w it is 4w, in the others odd or at least 20.
template <class Storage>
__device__ __forceinline__ void tell_rescale(Storage& s, int buffer, int t, int row_at,
                                             bool moved) {
  if (t == 0 && row_at < 20 && row_at % 2 == 0)
    reinterpret_cast<std::uint8_t*>(&s.rescale_flags[buffer])[row_at / 4] = moved ? 1 : 0;
}

// The softmax of one tile by exponentials; P and what belongs to it go to shared memory. False, and
// no P, if that is not possible for all rows of the warpgroup.
template <class Traits, class Storage>
__device__ __forceinline__ bool softmax_exponentials(Storage& s, int buffer, int visible,
                                                     bool first, float (&y)[64], float2 (&f)[8],
                                                     ScoreLane& lane) {
  constexpr int kBlocks = Traits::kBlocks;
  float m[kBlocks][2];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) exponential_block<Traits>(s, buffer, b, y, f, lane, m[b]);
  if (visible < kTileTokens) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) mask_block<Traits>(s, b, visible, y, lane, m[b]);
  }
  // PERF: what P's sums take is on its way while lanes exchange maxima, in the registers that the
  // token scales leave.
  uint4 ratios[2] = {sum_factors(s, buffer, 0, lane.t), sum_factors(s, buffer, 4, lane.t)};
  float norm[kBlocks];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) norm[b] = s.sum_norm[buffer][b];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) quad_maximum(m[b]);
  const float tile_maximum[2] = {fmaxf(m[0][0], m[kBlocks - 1][0]),
                                 fmaxf(m[0][1], m[kBlocks - 1][1])};
  // The warpgroup decides as one: wgmma takes all of it.
  if (!barrier_and(kScoreBarrier, 128,
                   within(tile_maximum, fmaxf(norm[0], norm[kBlocks - 1]), first)))
    return false;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    float gain[2], sigma[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool counts = m[b][r] >= kVanishing;
      gain[r] = counts ? 448.0f * rcp_approx_ftz(m[b][r]) : 0.0f;
      sigma[r] = counts ? m[b][r] * (1.0f / 448.0f) : 0.0f;
    }
    quantize_block<Traits>(s, buffer, b, y, gain, sigma, ratios, norm[b], lane, lane.sum);
  }
  tell_rescale(s, buffer, lane.t, lane.row_at, false);
  return true;
}

// Scores of one P block become logits y, in place.
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
__device__ __forceinline__ void mask_logits(Storage& s, int block, int visible, float (&y)[64],
                                            const ScoreLane& lane) {
  constexpr int kSteps = Traits::kPBlock / 8;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int seen = visible + s.seen_more[lane.row_at + 2 * r] - 2 * lane.t;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int n = block * kSteps + i;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * n + e >= seen) y[4 * n + 2 * r + e] = -INFINITY;
    }
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
  quad_maximum(m);
}

// Moves the references of both rows if the tile's maximum asks for it. Returns whether a row moved
// after the item's first tile: PV must then rescale O. (The rule looks at tiles, not P blocks: R
// only keeps the f32 range, no bit of P depends on it.)
template <class Storage>
__device__ __forceinline__ bool move_reference(Storage& s, int buffer, const float (&m)[2],
                                               const ScoreLane& lane, RowSums& sums) {
  float rescale[2];
  bool moved = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float reference = m[r] > sums.reference[r] + 40.0f ? m[r] : sums.reference[r];
    rescale[r] = ex2_approx_ftz(sums.reference[r] - reference);
    moved = moved || (reference != sums.reference[r] && sums.reference[r] != kNoReference);
    sums.sum[r] *= rescale[r];
    sums.reference[r] = reference;
  }
  moved = __any_sync(~0u, moved);
  if (moved && lane.t == 0) {
    s.rescale[buffer][lane.row_at] = rescale[0];
    s.rescale[buffer][lane.row_at + 2] = rescale[1];  // row + 8
  }
  return moved;
}

// The softmax of one tile by logits, which is right for all numbers. Source: numeric/softmax.h.
template <class Traits, class Storage>
__device__ __forceinline__ void softmax_logits(Storage& s, int buffer, int visible, float (&y)[64],
                                               float2 (&f)[8], const ScoreLane& lane,
                                               RowSums& sums) {
  constexpr int kBlocks = Traits::kBlocks, kScores = Traits::kPBlock / 2;
  float m[kBlocks][2];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    scale_block<Traits>(s, buffer, b, y, f, lane);
    if (visible < kTileTokens) mask_logits<Traits>(s, b, visible, y, lane);
    block_maximum<Traits>(b, y, m[b]);
  }
  const float tile_maximum[2] = {fmaxf(m[0][0], m[kBlocks - 1][0]),
                                 fmaxf(m[0][1], m[kBlocks - 1][1])};
  const bool moved = move_reference(s, buffer, tile_maximum, lane, sums);
  tell_rescale(s, buffer, lane.t, lane.row_at, moved);
  uint4 ratios[2] = {sum_factors(s, buffer, 0, lane.t), sum_factors(s, buffer, 4, lane.t)};
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const float gain[2] = {1.0f, 1.0f};
    float shift[2], sigma[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shift[r] = m[b][r] == -INFINITY ? 0.0f : m[b][r] - 8.80735492205760410744f;  // log2 448
      sigma[r] = ex2_approx_ftz(m[b][r] - sums.reference[r]) * (1.0f / 448.0f);
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      float& x = y[b * kScores + i];
      x = ex2_approx_ftz(x - shift[i >> 1 & 1]);
    }
    quantize_block<Traits>(s, buffer, b, y, gain, sigma, ratios, s.sum_norm[buffer][b], lane,
                           sums.sum);
  }
}

// Scores of a tile, and the scales of its first 64 tokens.
template <class Storage>
__device__ __forceinline__ void scores_of_tile(Storage& s, Turn turn, int t, float (&scores)[64],
                                               float2 (&f)[8]) {
  qk_gemm(s, turn, scores);
#pragma unroll
  for (int n = 0; n < 8; ++n) f[n] = token_scales(s, turn.slot(), n, t);
  wait(s.p_empty[turn.slot()], turn.phase() ^ 1);
  wgmma_wait<0>();
  pin_registers(scores);
}

// Query and keys are given back. Exponentials do it behind the softmax, when it is certain that the
// scores will not be asked for again. (PV holds the latents for longer anyway.)
template <class Storage>
__device__ __forceinline__ void give_back(Storage& s, int slot, bool last) {
  arrive_warp(s.k_empty[slot][0], s.k_empty[slot][1], s.k_empty[slot][2]);
  if (last) arrive_warp(s.q_empty);
}

__device__ __forceinline__ ScoreLane score_lane(std::uint32_t p_address) {
  const int thread = keep(static_cast<int>(threadIdx.x & 127));
  const int store_row = (thread >> 5) * 16 + (thread & 15);
  ScoreLane lane;
  lane.t = thread & 3;
  lane.row_at = row_float(first_row());
  lane.store_at = p_address + store_row * 128;
  lane.store_unit = ((thread & 31) >> 4) ^ (store_row & 7);
  return lane;
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
                                         int buffer, RowSums sums, int row_begin) {
  const int row = first_row();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float l = sums.sum[r];
    l += __shfl_xor_sync(~0u, l, 1);
    l += __shfl_xor_sync(~0u, l, 2);
    if ((threadIdx.x & 3) == 0)
      finish_row(p, s, item, buffer, l, sums.reference[r], row + 8 * r, row_begin);
  }
}

// Row constants of an item.
template <class Storage>
__device__ __forceinline__ void begin_rows(const DecodeParams& p, Storage& s, int request,
                                           ScoreLane& lane) {
  const int row = first_row();
  const std::uint8_t* scales =
      reinterpret_cast<const std::uint8_t*>(p.q_scale) + request * p.q_scale_stride.batch;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::int64_t offset = s.scale_offset[row + 8 * r];
    lane.c[r] =
        offset < 0 ? 0.0f : *reinterpret_cast<const float*>(scales + offset) * p.scale_log2e;
    lane.sum[r] = 0.0f;
    if (lane.t == 0) s.seen_more[lane.row_at + 2 * r] = s.hidden[0] - s.hidden[row + 8 * r];
  }
  __syncwarp();
}

// Begins item n: row constants, the query. `visible`: tokens from the tile's first on that all rows
// of this CTA see; its first row hides the most.
template <class Storage>
__device__ __forceinline__ void begin_item(const DecodeParams& p, Storage& s,
                                           const PartItems& items, int n, ScoreLane& lane,
                                           int& visible, int& tiles_left) {
  const DecodeItem* item = items.at(p.plan, n);
  begin_rows(p, s, item->request, lane);
  visible = item->length - s.hidden[0] - item->tile_begin * kTileTokens;
  wait(s.q_full, static_cast<std::uint32_t>(n) & 1);
  tiles_left = item->tile_end - item->tile_begin;
}

// After the last P, so that PV need not wait for it.
template <class Storage>
__device__ __forceinline__ void end_item(const DecodeParams& p, Storage& s, const PartItems& items,
                                         int n, const RowSums& sums, int row_begin) {
  finish_rows(p, s, items.at(p.plan, n), n & 3, sums, row_begin);
  arrive_warp(s.l_full[n & 1]);
}

template <class Traits, class Storage>
__device__ __forceinline__ void tile_by_logits(Storage& s, const ScoreLane& lane, Turn turn,
                                               int tiles_left, int visible, RowSums& sums) {
  float scores[64];
  float2 f[8];
  scores_of_tile(s, turn, lane.t, scores, f);
  give_back(s, turn.slot(), tiles_left == 1);
  softmax_logits<Traits>(s, turn.slot(), visible, scores, f, lane, sums);
  fence_proxy_async_shared();
  arrive_warp(s.p_full[turn.slot()]);
}

// A part by logits.
template <class Traits, class Storage>
__device__ __forceinline__ void score_by_logits(const DecodeParams& p, Storage& s, PartItems items,
                                                int row_begin) {
  ScoreLane lane = score_lane(shared_address(s.p[0]));
  Turn turn;
  for (int n = 0; n < items.count; ++n) {
    int visible, tiles_left;
    begin_item(p, s, items, n, lane, visible, tiles_left);
    RowSums sums = {{kNoReference, kNoReference}, {0.0f, 0.0f}};
    for (; tiles_left > 0; --tiles_left, visible -= kTileTokens, turn.next())
      tile_by_logits<Traits>(s, lane, turn, tiles_left, visible, sums);
    end_item(p, s, items, n, sums, row_begin);
  }
}

// Where the exponentials stop or go on: item, tiles left, visible tokens, turn; each lane's sums
// lie in P. PERF: through memory, there and back: with anything in common in registers ptxas finds
// enough for neither loop.
struct Stop {
  int item, tiles_left, visible;
  std::uint32_t turn;
};

template <class Storage>
__device__ __forceinline__ void stop_at(Storage& s, int item, int tiles_left, int visible,
                                        Turn turn) {
  if ((threadIdx.x & 127) == 0)
    *reinterpret_cast<Stop*>(s.stop) = {item, tiles_left, visible, turn.n};
  barrier_sync(kScoreBarrier, 128);
}

// The rest of an item by logits, from the tile on where the exponentials stopped. The next item
// begins with exponentials again: no row's numbers may depend on another request.
template <class Traits, class Storage>
__device__ __forceinline__ void score_rest(const DecodeParams& p, Storage& s, PartItems items,
                                           int row_begin) {
  ScoreLane lane = score_lane(shared_address(s.p[0]));
  const Stop stop = *reinterpret_cast<const Stop*>(s.stop);
  const int n = stop.item;
  int tiles_left = stop.tiles_left, visible = stop.visible;
  Turn turn{stop.turn};
  RowSums sums = {{kNoReference, kNoReference}, {0.0f, 0.0f}};
  const auto l = reinterpret_cast<const float2*>(s.p[turn.slot()])[threadIdx.x & 127];
  const DecodeItem* item = items.at(p.plan, n);
  begin_rows(p, s, item->request, lane);
  if (tiles_left < item->tile_end - item->tile_begin)
    sums = {{0.0f, 0.0f}, {l.x, l.y}};  // R was 0 in the tiles before
  barrier_sync(kScoreBarrier, 128);     // before somebody's P overwrites them
  for (; tiles_left > 0; --tiles_left, visible -= kTileTokens, turn.next())
    tile_by_logits<Traits>(s, lane, turn, tiles_left, visible, sums);
  end_item(p, s, items, n, sums, row_begin);
  stop_at(s, n + 1, 0, 0, turn);
}

// From the item on where `stop` says. False where the exponentials stop.
template <class Traits, class Storage>
__device__ __forceinline__ bool score_by_exponentials(const DecodeParams& p, Storage& s,
                                                      PartItems items, int row_begin) {
  ScoreLane lane = score_lane(shared_address(s.p[0]));
  const Stop stop = *reinterpret_cast<const Stop*>(s.stop);
  Turn turn{stop.turn};
  for (int n = stop.item; n < items.count; ++n) {
    int visible, tiles_left;
    bool first = true;
    begin_item(p, s, items, n, lane, visible, tiles_left);
    for (; tiles_left > 0; --tiles_left, visible -= kTileTokens, turn.next()) {
      float scores[64];
      float2 f[8];
      scores_of_tile(s, turn, lane.t, scores, f);
      if (!softmax_exponentials<Traits>(s, turn.slot(), visible, first, scores, f, lane)) {
        reinterpret_cast<float2*>(s.p[turn.slot()])[threadIdx.x & 127] =
            make_float2(lane.sum[0], lane.sum[1]);
        stop_at(s, n, tiles_left, visible, turn);
        return false;
      }
      first = false;
      fence_proxy_async_shared();
      arrive_warp(s.p_full[turn.slot()]);
      give_back(s, turn.slot(), tiles_left == 1);
    }
    end_item(p, s, items, n, {{0.0f, 0.0f}, {lane.sum[0], lane.sum[1]}}, row_begin);
  }
  return true;
}

template <class Traits, class Storage>
__device__ void score(const DecodeParams& p, Storage& s, PartItems items, int row_begin) {
  if constexpr (Traits::kBlocks == 2) {  // two P blocks a tile: no registers for both forms
    score_by_logits<Traits>(p, s, items, row_begin);
  } else {
    stop_at(s, 0, 0, 0, Turn{});
    while (!score_by_exponentials<Traits>(p, s, items, row_begin))
      score_rest<Traits>(p, s, items, row_begin);
  }
}

}  // namespace fp8_decode
}  // namespace snapmla::cuda
