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

struct Row {
  float o[16];  // dims 4 lane + 128 i + {0..3}
  float weight;
};

__device__ float warp_max(float x) {
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

// This warp's share of the splits; `maximum` is over all of them.
__device__ Row merge(const DecodeParams& p, int first_slot, int count, int row, int begin, int step,
                     float maximum) {
  const int lane = threadIdx.x & 31;
  Row r{};
  for (int chunk = 0; chunk < count; chunk += 32) {
    const int split = chunk + lane;
    const float lse =
        split < count
            ? p.plan.lse_accum[static_cast<std::int64_t>(first_slot + split) * p.rows + row]
            : -INFINITY;
    const float w = ptx::ex2_approx_ftz(lse - maximum);
    const int n = min(32, count - chunk);
#pragma unroll 4
    for (int i = (begin + step - chunk % step) % step; i < n; i += step) {
      const float weight = __shfl_sync(~0u, w, i);
      if (weight == 0.0f) continue;  // its output may never have been written
      const float* from =
          p.plan.out_accum +
          (static_cast<std::int64_t>(first_slot + chunk + i) * p.slot_rows + row) * 512;
      r.weight += weight;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float4 v = *reinterpret_cast<const float4*>(from + 4 * lane + 128 * k);
        r.o[4 * k + 0] = fmaf(weight, v.x, r.o[4 * k + 0]);
        r.o[4 * k + 1] = fmaf(weight, v.y, r.o[4 * k + 1]);
        r.o[4 * k + 2] = fmaf(weight, v.z, r.o[4 * k + 2]);
        r.o[4 * k + 3] = fmaf(weight, v.w, r.o[4 * k + 3]);
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
  const int first = of.first_slot, count = exists ? of.splits : 0;
  float maximum = -INFINITY;
  for (int split = lane; split < count; split += 32)
    maximum =
        fmaxf(maximum, p.plan.lse_accum[static_cast<std::int64_t>(first + split) * p.rows + row]);
  maximum = warp_max(maximum);
  if (maximum == -INFINITY) maximum = 0.0f;  // all empty, or NaN, which must reach the output
  Row r = merge(p, first, count, row, share, kWarps, maximum);
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

// Few requests: grid (rows / rows of a CTA, batch).
template <int kWarps>
__global__ void __launch_bounds__(kThreads)
    combine_few_kernel(const __grid_constant__ DecodeParams p) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const auto warp = static_cast<int>(threadIdx.x >> 5);
  const int row = static_cast<int>(blockIdx.x) * (kWarpsPerCta / kWarps) + warp / kWarps;
  if (static_cast<int>(blockIdx.y) < *p.plan.num_merges)
    combine_row<kWarps>(p, p.plan.merges[blockIdx.y], row);
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
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int row = static_cast<int>(blockIdx.x) * kWarpsPerCta + static_cast<int>(threadIdx.x >> 5);
  if (row >= p.rows) return;
  const int num_merges = *p.plan.num_merges;
  for (int i = static_cast<int>(blockIdx.y); i < num_merges; i += static_cast<int>(gridDim.y))
    combine_row<1>(p, p.plan.merges[i], row);
}

}  // namespace

void launch_combine(const DecodeParams& p, cudaStream_t stream) {
  const auto requests = static_cast<unsigned>(p.batch);
  // Which warps add up a row decides the order.
  if (p.batch <= 8 && !p.deterministic) {
    // About so many splits has each of them, if they are alike.
    const int splits = p.parts / p.batch;
    return splits <= 6    ? launch_few<4>(p, stream)
           : splits <= 12 ? launch_few<8>(p, stream)
                          : launch_few<kWarpsPerCta>(p, stream);
  }
  const auto groups = static_cast<unsigned>((p.rows + kWarpsPerCta - 1) / kWarpsPerCta);
  launch("combine", Ordering::kOverlap, combine_many_kernel,
         dim3(groups, std::clamp(512u / groups, 1u, requests)), dim3(kThreads), 0, stream, p);
}

}  // namespace snapmla::cuda
