// Absorbed MLA decode over the FP8 cache: scores, online softmax, P quantised per block, PV.
//
//   S~ = q^ K^T (e4m3, 512 wide) + q_rope' k_rope'^T (bf16, 64 wide)       [64 rows x 128 tokens]
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
// Grid: parts * row_tiles CTAs of 512 threads, one per SM. Each walks the items of its part.
//   warpgroup 0 (24 registers)   warp 0: page copies; warp 1: token factors; warps 2, 3: query
//   warpgroup 1                  scores, softmax, P
//   warpgroups 2, 3              PV, output dims 0-255 and 256-511
//
//   tile:     j                    j+1
//   wg 1    | QK(j) | softmax(j) | QK(j+1) | softmax(j+1) |
//   wg 2,3  |    PV(j-1)         |     PV(j)              |
//   copies  |  chunk by chunk into the ring of two tiles, as QK and PV release them
//
// Shared memory (bytes): query 40,960; ring 2 x (4 x 16,384 latent + 16,384 rope + 512 scales);
// P 2 x 8,192; factors, sigma and barriers about 5,000. See SharedStorage.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backends/cuda/mla_decode/decode_params.h"
#include "backends/cuda/ptx/barrier.h"
#include "backends/cuda/ptx/bulk_copy.h"
#include "backends/cuda/ptx/convert.h"
#include "backends/cuda/ptx/fence.h"
#include "backends/cuda/ptx/math.h"
#include "backends/cuda/ptx/matrix.h"
#include "backends/cuda/ptx/mbarrier.h"
#include "backends/cuda/ptx/pdl.h"
#include "backends/cuda/ptx/shared.h"
#include "backends/cuda/ptx/wgmma.h"
#include "backends/cuda/ptx/wgmma_fp8.h"

namespace snapmla::cuda {

// kRows: rows that PV computes, the width N of its wgmma. kPBlock: tokens that share a P scale.
template <int kRows_, int kPBlock_>
struct Fp8DecodeTraits {
  static constexpr int kRows = kRows_;
  static constexpr int kPBlock = kPBlock_;
  static_assert(kRows == 16 || kRows == 32 || kRows == 64, "PV width is 16, 32 or 64 rows");
  static_assert(kPBlock == 64 || kPBlock == 128, "P is quantised per 64 or 128 tokens");
  static constexpr int kBlocks = kTileTokens / kPBlock;  // P blocks of a tile
  static constexpr int kStages = 2;
  static constexpr int kThreads = 512;
  // Registers per thread: 128 * (24 + scores + 2 * pv) = 65,536 at most. With fewer rows O is
  // small and the score warps may keep more.
  static constexpr int kScoreRegisters = kRows == 64 ? 104 : 168;
  static constexpr int kPvRegisters = kRows == 64 ? 192 : 144;
};

inline constexpr int kPageBytesChunk = 8192;  // 64 tokens x 128 bytes
inline constexpr int kChunkBytes = 16384;     // 128 tokens x 128 bytes
inline constexpr int kLatentChunks = 4, kRopeChunk = 4, kChunks = 5;
inline constexpr int kQueryChunkBytes = 64 * 128;  // 64 rows x 128 bytes
// Per-row floats (sigma, 1/l, rescale) lie by lane: lane t of a quad owns rows 8n + 2t + e and
// reads them as 16-byte vectors at t * 20 + 2n + e, free of bank conflicts.
inline constexpr int kRowFloats = 80;
__device__ __forceinline__ int row_float(int row) {
  return ((row & 7) >> 1) * 20 + (row >> 3) * 2 + (row & 1);
}

template <class Traits>
struct alignas(1024) Fp8SharedStorage {
  static constexpr int kStages = Traits::kStages, kBlocks = Traits::kBlocks;
  std::uint8_t query[kChunks][kQueryChunkBytes];     // chunk 4: rope
  std::uint8_t keys[kStages][kChunks][kChunkBytes];  // chunk 4: rope
  std::uint8_t p[2][64 * 128];                       // [row][128 tokens] e4m3, swizzled
  float token_scale[2][kTileTokens];                 // s of each token, 0 past the end, NaN if bad
  std::uint32_t sum_factors[2][4][16];               // [t][n]: f16x2 s_min / s of those tokens
  float sigma[2][kBlocks][kRowFloats];
  float rescale[2][kRowFloats];
  float inverse_sum[4][kRowFloats];  // 1 / l, by item: PV may be three items behind
  float sum_norm[2][kBlocks];        // 1 / s_min of the block
  std::uint32_t rescale_flags[2];    // byte w: score warp w moved a reference
  int row_visible[64];               // keys that each row sees, of the current item
  std::int64_t row_offset[64];       // of out, from the request; -1: no row
  std::uint64_t k_full[kStages][kChunks], k_empty[kStages][kChunks];
  std::uint64_t f_full[2], f_empty[2];
  std::uint64_t p_full[2], p_empty[2];
  std::uint64_t q_full, q_empty;
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

__device__ __forceinline__ void arrive_warp(std::uint64_t& barrier) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) mbarrier_arrive(shared_address(&barrier));
}

__device__ __forceinline__ void wait(std::uint64_t& barrier, std::uint32_t phase) {
  mbarrier_wait(shared_address(&barrier), phase);
}

__device__ __forceinline__ std::uint64_t k_major(std::uint32_t address) {
  return descriptor_swizzle128(address, 16, 1024);
}

// Number of keys that row `row` of its row tile sees.
__device__ __forceinline__ int visible_keys(const DecodeParams& p, int row, int length) {
  const int token = min(row / p.heads_q, p.seqlen_q - 1);
  return max(0, length - p.seqlen_q + token + 1);
}

// ---- warpgroup 0 ----

// One thread. Chunks arrive in the order in which QK takes them (0 2 1 3, rope), so that PV of the
// previous tile frees both halves of the output dims early. A second page that the request does not
// have is not looked up.
template <class Storage>
__device__ void copy_pages(const DecodeParams& p, Storage& s, int item_begin, int item_end) {
  constexpr std::uint32_t kOrder = 0xb9a8;  // low two bits of each digit: 0 2 1 3
  Turn turn;
  for (int i = item_begin; i < item_end; ++i) {
    const int request = p.plan.items[i].request;
    int tile = p.plan.items[i].tile_begin;
    const int tile_end = p.plan.items[i].tile_end;
    const std::int32_t* entry = p.block_table + request * p.table_stride + tile * 2;
    int pages_left = (p.cache_seqlens[request] + 63) / 64 - tile * 2;
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
      // `bytes` of both pages, each from its plane, to consecutive places.
      const auto copy = [&](std::uint32_t to, const std::uint8_t* plane, std::int64_t stride,
                            std::uint32_t bytes, std::uint32_t full) {
        bulk_copy_g2s(to, plane + page0 * stride, bytes, full);
        if (page1 >= 0) bulk_copy_g2s(to + bytes, plane + page1 * stride, bytes, full);
      };
      const auto begin = [&](int c, std::uint32_t bytes) {
        wait(s.k_empty[slot][c], turn.phase() ^ 1);
        const std::uint32_t full = shared_address(&s.k_full[slot][c]);
        mbarrier_arrive_expect_tx(full, page1 < 0 ? bytes : 2 * bytes);
        return full;
      };
#pragma unroll 1
      for (std::uint32_t order = kOrder; order != 0; order >>= 4) {
        const int c = static_cast<int>(order & 3);
        const std::uint32_t full = begin(c, kPageBytesChunk);
        copy(shared_address(s.keys[slot][c]), p.kv_latent + c * kPageBytesChunk,
             p.latent_page_stride, kPageBytesChunk, full);
      }
      const std::uint32_t full = begin(kRopeChunk, kPageBytesChunk);
      copy(shared_address(s.keys[slot][kRopeChunk]), p.kv_rope, p.rope_page_stride, kPageBytesChunk,
           full);
    }
  }
}

// One warp: what the score warps need of each token, from its scale. Tokens past the end of the
// request get zeros (their scales may be anything). A scale that is not positive is NaN. Scales are
// read straight from global memory, a tile ahead, and page numbers two tiles ahead.
template <class Traits, class Storage>
__device__ void make_factors(const DecodeParams& p, Storage& s, int item_begin, int item_end) {
  const int lane = threadIdx.x & 31, page = lane >> 4;  // four tokens per lane
  Turn turn;
  for (int i = item_begin; i < item_end; ++i) {
    const int request = p.plan.items[i].request;
    int tiles_left = p.plan.items[i].tile_end - p.plan.items[i].tile_begin;
    const int tile_begin = p.plan.items[i].tile_begin;
    int valid = p.cache_seqlens[request] - tile_begin * kTileTokens - lane * 4;  // of this lane's
    const std::int32_t* entry = p.block_table + request * p.table_stride + tile_begin * 2 + page;
    // Pages are looked up only where a token of this lane's page exists.
    int pages_left = (p.cache_seqlens[request] + 63) / 64 - tile_begin * 2 - page;
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
      wait(s.f_empty[buffer], turn.phase() ^ 1);
      *reinterpret_cast<float4*>(&s.token_scale[buffer][lane * 4]) =
          make_float4(scale[0], scale[1], scale[2], scale[3]);
      const int n = lane >> 1;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const float s0 = scale[2 * pair], s1 = scale[2 * pair + 1];
        const int t = (lane & 1) * 2 + pair;
        s.sum_factors[buffer][t][n] = cvt_f16x2(s0 == 0.0f ? 0.0f : __fdividef(smallest, s0),
                                                s1 == 0.0f ? 0.0f : __fdividef(smallest, s1));
      }
      if (lane % (Traits::kPBlock / 4) == 0)
        s.sum_norm[buffer][lane * 4 / Traits::kPBlock] = 1.0f / smallest;
      arrive_warp(s.f_full[buffer]);
    }
  }
}

// Two warps: the query of each item into the swizzled image; rows past the end become zeros.
template <class Storage>
__device__ void load_query(const DecodeParams& p, Storage& s, int item_begin, int item_end,
                           int row_begin) {
  const int thread = threadIdx.x & 63;
  for (int i = item_begin; i < item_end; ++i) {
    const std::int32_t request = p.plan.items[i].request;
    wait(s.q_empty, static_cast<std::uint32_t>(i - item_begin + 1) & 1);
    const std::uint8_t* latent = p.q_latent + request * p.q_latent_stride.batch;
    const std::uint8_t* rope = p.q_rope + request * p.q_rope_stride.batch;
#pragma unroll 1
    for (int r = thread >> 3; r < 64; r += 8) {
      const int row = row_begin + r;
      const int token = row / p.heads_q, head = row % p.heads_q;
      const std::uint32_t bytes = row < p.rows ? 16 : 0;
      const int unit = thread & 7;
      const std::uint32_t to = shared_address(s.query[0]) + r * 128 + ((unit ^ (r & 7)) << 4);
      const std::int64_t at =
          bytes ? token * p.q_latent_stride.token + head * p.q_latent_stride.head : 0;
      const std::int64_t rope_at =
          bytes ? token * p.q_rope_stride.token + head * p.q_rope_stride.head : 0;
#pragma unroll 1
      for (int c = 0; c < kChunks; ++c)
        cp_async_16(to + c * kQueryChunkBytes,
                    (c == kRopeChunk ? rope + rope_at : latent + at + c * 128) + unit * 16, bytes);
    }
    cp_async_wait_all();
    fence_proxy_async_shared();
    arrive_warp(s.q_full);
  }
}

// ---- warpgroup 1 ----

// Issues the score GEMM of one tile; the caller waits for it.
template <class Storage>
__device__ __forceinline__ void qk_gemm(Storage& s, Turn turn, float (&scores)[64]) {
  constexpr int kOrder[kLatentChunks] = {0, 2, 1, 3};
  constexpr std::uint64_t kStep = 32 >> 4;  // one k step inside the swizzled row
  const int slot = turn.slot();
  pin_registers(scores);
#pragma unroll
  for (int o = 0; o < kLatentChunks; ++o) {
    const int c = kOrder[o];
    const std::uint64_t a = k_major(shared_address(s.query[c]));
    const std::uint64_t b = k_major(shared_address(s.keys[slot][c]));
    wait(s.k_full[slot][c], turn.phase());
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma_ss_m64n128k32_e4m3(scores, a + k * kStep, b + k * kStep, o + k > 0);
  }
  // The rope part last: it may be much larger than the latent part, and FP8 products added under a
  // large accumulator would lose bits; BF16 ones do not.
  const std::uint64_t a = k_major(shared_address(s.query[kRopeChunk]));
  const std::uint64_t b = k_major(shared_address(s.keys[slot][kRopeChunk]));
  wait(s.k_full[slot][kRopeChunk], turn.phase());
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

// R before the first token: so low that any finite logit moves it, with factor 2^(R - m) = 0.
inline constexpr float kNoReference = -1e30f;

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
#pragma unroll
  for (int i = 0; i < kSteps; i += 4) {  // 32 tokens: two 16-byte units of a P row
    const int n = n0 + i;
    const uint4 ratio4 = *reinterpret_cast<const uint4*>(&s.sum_factors[buffer][lane.t][n]);
    const std::uint32_t ratio[4] = {ratio4.x, ratio4.y, ratio4.z, ratio4.w};
    std::uint32_t words[4], part[2] = {0u, 0u};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        std::uint32_t codes[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = 4 * (n + 2 * pair + h) + 2 * r;
          codes[h] =
              cvt_e4m3x2(ex2_approx_ftz(y[at] - shift[r]), ex2_approx_ftz(y[at + 1] - shift[r]));
          part[r] = fma_f16x2(cvt_f16x2_from_e4m3x2(codes[h]), ratio[2 * pair + h], part[r]);
        }
        words[2 * pair + r] = codes[0] | codes[1] << 16;
      }
    }
    stmatrix_x4(lane.store_at + buffer * 8192 + (((n >> 1) ^ lane.store_unit) << 4), words);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 f = cvt_f32x2_from_f16x2(part[r]);
      sum[r] += f.x + f.y;
    }
  }
  const float norm = s.sum_norm[buffer][block];
  lane.sum[0] = fmaf(sum[0], sigma[0] * norm, lane.sum[0]);
  lane.sum[1] = fmaf(sum[1], sigma[1] * norm, lane.sum[1]);
}

// l and lse of a finished item; 1 / l goes to the PV warps.
template <class Storage>
__device__ __noinline__ void finish_rows(const DecodeParams& p, Storage& s, int item_index,
                                         int buffer, float sum0, float sum1, float reference0,
                                         float reference1, int row, int row_begin) {
  const DecodeItem item = p.plan.items[item_index];
  const float sums[2] = {sum0, sum1}, references[2] = {reference0, reference1};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float l = sums[r];
    l += __shfl_xor_sync(~0u, l, 1);
    l += __shfl_xor_sync(~0u, l, 2);
    if ((threadIdx.x & 3) != 0) continue;
    s.inverse_sum[buffer][row_float(row + 8 * r)] = l == 0.0f ? 0.0f : 1.0f / l;
    const float lse2 = l == 0.0f ? -INFINITY : references[r] + log2f(l);
    const int global_row = row_begin + row + 8 * r;
    if (global_row >= p.rows) continue;
    if (item.slot >= 0) {
      p.plan.lse_accum[static_cast<std::int64_t>(item.slot) * p.rows + global_row] = lse2;
    } else if (p.lse) {
      const int token = global_row / p.heads_q, head = global_row % p.heads_q;
      p.lse[item.request * p.lse_batch_stride + head * p.lse_head_stride +
            token * p.lse_token_stride] = lse2 * 0.69314718055994530942f;
    }
  }
}

// Row constants of an item; the number of keys each row sees goes to shared memory.
template <class Storage>
__device__ __forceinline__ void begin_rows(const DecodeParams& p, Storage& s, int request,
                                           int length, int row, int row_begin, ScoreLane& lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int global_row = row_begin + row + 8 * r;
    const bool exists = global_row < p.rows;
    const int token = global_row / p.heads_q, head = global_row % p.heads_q;
    lane.c[r] = exists ? *reinterpret_cast<const float*>(
                             reinterpret_cast<const std::uint8_t*>(p.q_scale) +
                             request * p.q_scale_stride.batch + token * p.q_scale_stride.token +
                             head * p.q_scale_stride.head) *
                             p.scale_log2e
                       : 0.0f;
    lane.reference[r] = kNoReference;
    lane.sum[r] = 0.0f;
    if (lane.t == 0) s.row_visible[row + 8 * r] = visible_keys(p, global_row, length);
  }
  __syncwarp();
}

template <class Traits, class Storage>
__device__ void score(const DecodeParams& p, Storage& s, int item_begin, int item_end,
                      int row_begin) {
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
  for (int i = item_begin; i < item_end; ++i) {
    const volatile DecodeItem* item = p.plan.items + i;
    const int length = p.cache_seqlens[item->request];
    begin_rows(p, s, item->request, length, row, row_begin, lane);
    // The first token that some row of this CTA must not see.
    const int all_visible = visible_keys(p, row_begin, length);
    wait(s.q_full, static_cast<std::uint32_t>(i - item_begin) & 1);
    int tiles_left = item->tile_end - item->tile_begin;
    int first_token = item->tile_begin * kTileTokens;
    for (; tiles_left > 0; --tiles_left, first_token += kTileTokens, turn.next()) {
      const int slot = turn.slot(), buffer = slot;
      float scores[64];
      qk_gemm(s, turn, scores);
      wait(s.f_full[buffer], turn.phase());
      float2 f[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) f[n] = token_scales(s, buffer, n, lane.t);
      wait(s.p_empty[buffer], turn.phase() ^ 1);
      wgmma_wait<0>();
      pin_registers(scores);
      __syncwarp();
      if ((thread & 31) == 0) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
          mbarrier_arrive(shared_address(&s.k_empty[slot][chunk]));
        if (tiles_left == 1) mbarrier_arrive(shared_address(&s.q_empty));
      }
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
        if (tiles_left == 1)
          finish_rows(p, s, i, i & 3, lane.sum[0], lane.sum[1], lane.reference[0],
                      lane.reference[1], row, row_begin);
        fence_proxy_async_shared();
      }
      __syncwarp();
      if ((thread & 31) == 0) {
        mbarrier_arrive(shared_address(&s.p_full[buffer]));
        mbarrier_arrive(shared_address(&s.f_empty[buffer]));
      }
    }
  }
}

// ---- warpgroups 2 and 3 ----

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

// Tokens past the end of a request may hold NaN, which P = 0 would not stop: this half's dims of
// them become 0. QK may still be reading them, but what it makes of them is masked.
template <class Storage>
__device__ __noinline__ void clear_tail(Storage& s, Turn turn, int half, int valid) {
  const int thread = threadIdx.x & 127;
  for (int c = half * 2; c < half * 2 + 2; ++c) {
    wait(s.k_full[turn.slot()][c], turn.phase());
    auto* units = reinterpret_cast<uint4*>(s.keys[turn.slot()][c]);
    for (int u = valid * 8 + thread; u < kTileTokens * 8; u += 128)
      units[u] = make_uint4(0, 0, 0, 0);
  }
  fence_proxy_async_shared();  // the next copy into this slot must come after these writes
  barrier_sync(1 + half, 128);
}

template <int kRows, class Apply>
__device__ __forceinline__ void for_row_factors(const float* factors, int t, Apply apply) {
#pragma unroll
  for (int n = 0; n < kRows / 8; n += 2) {
    const float4 f = *reinterpret_cast<const float4*>(factors + t * 20 + n * 2);
    apply(n, f.x, f.y);
    apply(n + 1, f.z, f.w);
  }
}

// Rows whose 1 / l is 0 saw no token: exactly 0, whatever O holds.
template <class Traits, class Storage>
__device__ __forceinline__ void store_out(const DecodeParams& p, Storage& s, const DecodeItem& item,
                                          const float (&o)[4][Traits::kRows / 2],
                                          const float* inverse, int half, int row_begin) {
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, t = lane & 3;
  const int dim = half * 256 + warp * 16 + 2 * (lane >> 2);
  const bool f32 = item.slot >= 0 || p.out_f32;
  std::uint8_t* base = item.slot >= 0
                           ? reinterpret_cast<std::uint8_t*>(
                                 p.plan.out_accum +
                                 (static_cast<std::int64_t>(item.slot) * p.rows + row_begin) * 512)
                           : static_cast<std::uint8_t*>(p.out) + item.request * p.out_stride.batch;
  base += dim * (f32 ? 4 : 2);
#pragma unroll
  for (int n = 0; n < Traits::kRows / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * n + 2 * t + e;
      if (row_begin + row >= p.rows) continue;
      const float f = inverse[t * 20 + 2 * n + e];
      std::uint8_t* to = base + (item.slot >= 0 ? row * 2048 : s.row_offset[row]);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float x = f == 0.0f ? 0.0f : o[m][4 * n + e] * f;
        const float y = f == 0.0f ? 0.0f : o[m][4 * n + 2 + e] * f;
        if (f32) {
          *reinterpret_cast<float2*>(to + m * 256) = make_float2(x, y);
        } else {
          *reinterpret_cast<std::uint32_t*>(to + m * 128) = cvt_bf16x2(x, y);
        }
      }
    }
  }
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
  const auto rescale = [&](std::uint32_t moved) {
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
  wait(s.k_full[slot][half * 2], phase);
  load_values(at(0, 0), values[0]);
  wait(s.p_full[buffer], phase);
  const std::uint32_t moved = s.rescale_flags[buffer];
  if (moved) rescale(moved);
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
    if (m == 1) arrive_warp(s.k_empty[slot][half * 2]);
    if (m == 3) arrive_warp(s.k_empty[slot][half * 2 + 1]);
    if constexpr (Traits::kBlocks == 1) wgmma_wait<1>();
    load_sigma(Traits::kBlocks - 1);
    if (m == 1) wait(s.k_full[slot][half * 2 + 1], phase);
    wgmma_wait<0>();
    pin_registers(acc);
    if (m < 3) load_values(at(m + 1, 0), b);
    promote(m, Traits::kBlocks - 1);
  }
}

#pragma nv_diag_default 549

template <class Traits, class Storage>
__device__ void accumulate_values(const DecodeParams& p, Storage& s, int item_begin, int item_end,
                                  int row_begin, int half) {
  constexpr int kRows = Traits::kRows;
  const int thread = keep(static_cast<int>(threadIdx.x & 127));
  const auto lane_at =
      static_cast<std::uint32_t>((thread & 31) * 128 + (((thread >> 5) ^ (thread & 7)) << 4));
  Turn turn;
  float o[4][kRows / 2];
  for (int i = item_begin; i < item_end; ++i) {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int k = 0; k < kRows / 2; ++k) o[m][k] = 0.0f;
    const volatile DecodeItem* item_at = p.plan.items + i;  // read again later: registers are short
    for (int tiles_left = item_at->tile_end - item_at->tile_begin; tiles_left > 0; --tiles_left) {
      // Only the last tile of an item can reach past the end of the request.
      if (tiles_left == 1) {
        const int valid = p.cache_seqlens[item_at->request] - (item_at->tile_end - 1) * kTileTokens;
        if (valid < kTileTokens) clear_tail(s, turn, half, valid);
      }
      pv_tile<Traits>(s, turn.slot(), turn.phase(), half, lane_at, thread & 3, o);
      arrive_warp(s.p_empty[turn.slot()]);
      turn.next();
    }
    const DecodeItem item = p.plan.items[i];
    store_out<Traits>(p, s, item, o, s.inverse_sum[i & 3], half, row_begin);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    fp8_decode_kernel(const __grid_constant__ DecodeParams p) {
  using Storage = Fp8SharedStorage<Traits>;
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  Storage& s = *reinterpret_cast<Storage*>(shared_bytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int warpgroup = __shfl_sync(~0u, thread >> 7, 0);  // the compiler sees that it is uniform
  const int part = static_cast<int>(blockIdx.x) / p.row_tiles;
  const int row_begin = (static_cast<int>(blockIdx.x) % p.row_tiles) * kRowTile;
  if (thread == 0) {
    const auto init = [](std::uint64_t& barrier, int arrivals) {
      mbarrier_init(shared_address(&barrier), static_cast<std::uint32_t>(arrivals));
    };
    for (int slot = 0; slot < 2; ++slot) {
      for (int c = 0; c < kChunks; ++c) {
        init(s.k_full[slot][c], 1);
        init(s.k_empty[slot][c],
             c == kRopeChunk ? 4 : 8);  // the score warps; the PV warps of a half
      }
      init(s.f_full[slot], 1);
      init(s.f_empty[slot], 4);
      init(s.p_full[slot], 4);
      init(s.p_empty[slot], 8);
      s.rescale_flags[slot] = 0;
    }
    init(s.q_full, 2);
    init(s.q_empty, 4);
    fence_mbarrier_init();
  }
  if (thread >= 128 && thread < 192) {
    const int r = thread - 128, row = row_begin + r;
    s.row_offset[r] =
        row < p.rows ? row / p.heads_q * p.out_stride.token + row % p.heads_q * p.out_stride.head
                     : -1;
  }
  __syncthreads();
  griddepcontrol_wait();  // the plan, the query and the cache come from earlier kernels
  const int item_begin = p.plan.part_begin[part], item_end = p.plan.part_begin[part + 1];
  if (warpgroup == 0) {
    setmaxnreg_dec<24>();
    const int warp = thread >> 5;
    if (warp == 0) {
      if (thread == 0) copy_pages(p, s, item_begin, item_end);
    } else if (warp == 1) {
      make_factors<Traits>(p, s, item_begin, item_end);
    } else {
      load_query(p, s, item_begin, item_end, row_begin);
    }
  } else if (warpgroup == 1) {
    if constexpr (Traits::kScoreRegisters > 128) setmaxnreg_inc<Traits::kScoreRegisters>();
    if constexpr (Traits::kScoreRegisters < 128) setmaxnreg_dec<Traits::kScoreRegisters>();
    score<Traits>(p, s, item_begin, item_end, row_begin);
  } else {
    setmaxnreg_inc<Traits::kPvRegisters>();
    accumulate_values<Traits>(p, s, item_begin, item_end, row_begin, warpgroup - 2);
  }
  griddepcontrol_launch_dependents();
}

}  // namespace fp8_decode
}  // namespace snapmla::cuda
