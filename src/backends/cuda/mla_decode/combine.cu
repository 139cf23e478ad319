// Merges the partial results of split requests, and writes empty ones.
//
//   m = max_s lse2_s,  w_s = 2^(lse2_s - m),  O = sum_s w_s O_s / sum_s w_s,
//   lse = ln 2 (m + log2 sum_s w_s);  all -inf: O = 0, lse = -inf
//
// kWarps warps share a row: each takes every kWarps-th split, a lane 16 of the 512 dims. One warp
// per row is best for many rows with few splits, a whole CTA for a single long request.
// PTXAS: no-spill
#include <algorithm>

#include "backends/cuda/launch.h"
#include "backends/cuda/mla_decode/combine.h"
#include "backends/cuda/ptx/convert.h"
#include "backends/cuda/ptx/math.h"
#include "backends/cuda/ptx/pdl.h"

namespace snapmla::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarpsPerCta = kThreads / 32;
constexpr int kWave = 128;  // CTAs that surely run at once

struct Row {
  float o[16];  // dims 4 lane + 128 i + {0..3}
  float weight;
};

__device__ float warp_max(float x) {
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

constexpr int kChunk = 32;  // splits whose weights a warp holds, one per lane

// This warp's share of the splits, every kWarps-th from `share` on: the first partial results are
// on their way while the weights are made.
template <int kWarps>
__device__ Row merge(const DecodeParams& p, const DecodeMerge& of, int count, int row, int share,
                     float& maximum) {
  // Partial results in flight. PERF: two take the registers of an SM's second CTA and are faster
  // all the same, by 1 to 4 us from 32,768 tokens on; four are no faster.
  constexpr int kAhead = 2;
  const int lane = threadIdx.x & 31;
  const auto lse_of = [&](int split) {
    return split < count ? __ldcg(p.plan.lse_accum +
                                  static_cast<std::int64_t>(of.first_slot + split) * p.rows + row)
                         : -INFINITY;
  };
  const float* from =
      p.plan.out_accum + (static_cast<std::int64_t>(of.first_slot) * p.slot_rows + row) * 512;
  float4 x[kAhead][4];
  const auto load = [&](int split) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int at = split + a * kWarps;
      if (at >= count) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        x[a][k] = __ldcg(reinterpret_cast<const float4*>(
            from + static_cast<std::int64_t>(at) * p.slot_rows * 512 + 4 * lane + 128 * k));
      }
    }
  };
  load(share);
  float lse = lse_of(lane);
  maximum = lse;
  for (int split = kChunk + lane; split < count; split += kChunk)
    maximum = fmaxf(maximum, lse_of(split));
  maximum = warp_max(maximum);
  if (maximum == -INFINITY) maximum = 0.0f;  // all empty, or NaN, which must reach the output
  Row r{};
  for (int chunk = 0; chunk < count; chunk += kChunk) {
    if (chunk > 0) lse = lse_of(chunk + lane);
    const float w = ptx::ex2_approx_ftz(lse - maximum);
    for (int i = share; i < kChunk && chunk + i < count; i += kAhead * kWarps) {
      if (chunk + i != share) load(chunk + i);
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const float weight = __shfl_sync(~0u, w, i + a * kWarps);
        if (chunk + i + a * kWarps >= count || weight == 0.0f) continue;
        r.weight += weight;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          r.o[4 * k + 0] = fmaf(weight, x[a][k].x, r.o[4 * k + 0]);
          r.o[4 * k + 1] = fmaf(weight, x[a][k].y, r.o[4 * k + 1]);
          r.o[4 * k + 2] = fmaf(weight, x[a][k].z, r.o[4 * k + 2]);
          r.o[4 * k + 3] = fmaf(weight, x[a][k].w, r.o[4 * k + 3]);
        }
      }
    }
  }
  return r;
}

__device__ void write(const DecodeParams& p, int request, int row, const Row& r, float maximum) {
  const int lane = threadIdx.x & 31, token = row / p.heads_q, head = row % p.heads_q;
  const float inverse = r.weight == 0.0f ? 0.0f : 1.0f / r.weight;
  std::uint8_t* out = static_cast<std::uint8_t*>(p.out) + request * p.out_stride.batch +
                      token * p.out_stride.token + head * p.out_stride.head;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int dim = 4 * lane + 128 * k;
    const float* o = r.o + 4 * k;
    if (p.out_f32) {
      *reinterpret_cast<float4*>(out + dim * 4) =
          make_float4(o[0] * inverse, o[1] * inverse, o[2] * inverse, o[3] * inverse);
    } else {
      *reinterpret_cast<uint2*>(out + dim * 2) =
          make_uint2(ptx::cvt_bf16x2(o[0] * inverse, o[1] * inverse),
                     ptx::cvt_bf16x2(o[2] * inverse, o[3] * inverse));
    }
  }
  if (lane == 0 && p.lse) {
    p.lse[request * p.lse_batch_stride + head * p.lse_head_stride + token * p.lse_token_stride] =
        r.weight == 0.0f ? -INFINITY : 0.69314718055994530942f * (maximum + log2f(r.weight));
  }
}

template <int kWarps>
__device__ void combine_row(const DecodeParams& p, const DecodeMerge& of, int row) {
  __shared__ float shared_o[kWarps > 1 ? kWarpsPerCta : 1][512];
  __shared__ float shared_weight[kWarpsPerCta];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, share = warp % kWarps;
  const bool exists = row < p.rows;  // a row past the end merges nothing
  float maximum;
  Row r = merge<kWarps>(p, of, exists ? of.splits : 0, row, share, maximum);
  if constexpr (kWarps > 1) {
    for (int k = 0; k < 16; ++k) shared_o[warp][k * 32 + lane] = r.o[k];
    if (lane == 0) shared_weight[warp] = r.weight;
    __syncthreads();
    if (share != 0) return;
    for (int w = warp + 1; w < warp + kWarps; ++w) {
      r.weight += shared_weight[w];
      for (int k = 0; k < 16; ++k) r.o[k] += shared_o[w][k * 32 + lane];
    }
  }
  if (share == 0 && exists) write(p, of.request, row, r, maximum);
}

// The plan's list may be read before the decode kernel is done: it lets this one start only when
// the plan is there.
__device__ int num_merges_of(const DecodeParams& p) { return __ldcg(p.plan.num_merges); }
__device__ DecodeMerge merge_at(const DecodeParams& p, int i) {
  const int4 m = __ldcg(reinterpret_cast<const int4*>(p.plan.merges + i));
  return {m.x, m.y, m.z, m.w};
}

// Few requests: grid (rows / rows of a CTA, batch).
template <int kWarps>
__global__ void __launch_bounds__(kThreads)
    combine_few_kernel(const __grid_constant__ DecodeParams p) {
  const auto warp = static_cast<int>(threadIdx.x >> 5), i = static_cast<int>(blockIdx.y);
  const int row = static_cast<int>(blockIdx.x) * (kWarpsPerCta / kWarps) + warp / kWarps;
  const bool some = i < num_merges_of(p);
  const DecodeMerge of = some ? merge_at(p, i) : DecodeMerge{};
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (some) combine_row<kWarps>(p, of, row);
}

template <int kWarps>
void launch_few(const DecodeParams& p, cudaStream_t stream) {
  constexpr int kRows = kWarpsPerCta / kWarps;
  launch("combine", Ordering::kOverlap, combine_few_kernel<kWarps>,
         dim3(static_cast<unsigned>((p.rows + kRows - 1) / kRows), static_cast<unsigned>(p.batch)),
         dim3(kThreads), 0, stream, p);
}

// Many requests: grid (rows / 16, some), a warp per row, over the plan's list of requests that need
// it.
__global__ void __launch_bounds__(kThreads)
    combine_many_kernel(const __grid_constant__ DecodeParams p) {
  const int row = static_cast<int>(blockIdx.x) * kWarpsPerCta + static_cast<int>(threadIdx.x >> 5);
  const int num_merges = num_merges_of(p);
  int i = static_cast<int>(blockIdx.y);
  DecodeMerge of = i < num_merges ? merge_at(p, i) : DecodeMerge{};
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (row >= p.rows) return;
  while (i < num_merges) {
    combine_row<1>(p, of, row);
    i += static_cast<int>(gridDim.y);
    if (i < num_merges) of = merge_at(p, i);
  }
}

}  // namespace

void launch_combine(const DecodeParams& p, cudaStream_t stream) {
  const auto requests = static_cast<unsigned>(p.batch);
  // Which warps add up a row decides the order.
  if (p.batch <= 8 && !p.deterministic) {
    // About so many splits has each of them, if they are alike. PERF: more warps for a row only as
    // long as all CTAs run at once: 8 requests of 8,192 tokens at 64 rows, 42 us with 16 warps, 36
    // with eight, 34 with four.
    const int splits = std::min(p.parts / p.batch + 1, p.max_tiles), rows = p.rows * p.batch;
    return splits > 12 && rows <= kWave      ? launch_few<kWarpsPerCta>(p, stream)
           : splits > 6 && rows <= 2 * kWave ? launch_few<kWarpsPerCta / 2>(p, stream)
                                             : launch_few<kWarpsPerCta / 4>(p, stream);
  }
  const auto groups = static_cast<unsigned>((p.rows + kWarpsPerCta - 1) / kWarpsPerCta);
  launch("combine", Ordering::kOverlap, combine_many_kernel,
         dim3(groups, std::clamp(512u / groups, 1u, requests)), dim3(kThreads), 0, stream, p);
}

}  // namespace snapmla::cuda
