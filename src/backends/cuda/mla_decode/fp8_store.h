// The end of an item in the FP8 decode kernel: O is divided by l and written; requests of few
// splits are merged here.
#pragma once

#include "backends/cuda/mla_decode/fp8_storage.h"
#include "backends/cuda/mla_decode/fragments.h"
#include "backends/cuda/ptx/barrier.h"
#include "backends/cuda/ptx/convert.h"
#include "backends/cuda/ptx/math.h"

namespace snapmla::cuda {
namespace fp8_decode {

// apply(n, f0, f1) for every column block n of O^T, with this lane's factors of rows 8n + 2t, + 1.
template <int kRows, class Apply>
__device__ __forceinline__ void for_row_factors(const float* factors, int t, Apply apply) {
#pragma unroll
  for (int n = 0; n < kRows / 8; n += 2) {
    const float4 f = *reinterpret_cast<const float4*>(factors + t * 20 + n * 2);
    apply(n, f.x, f.y);
    apply(n + 1, f.z, f.w);
  }
}

// Rows to `out`, times `factors` (row_float). A factor of 0 is a row that saw no token: exactly 0,
// whatever O holds.
template <class Traits, class Storage>
__device__ __forceinline__ void store_rows(const DecodeParams& p, Storage& s,
                                           const DecodeItem& item,
                                           const float (&o)[4][Traits::kRows / 2],
                                           const float* factors, int half, int row_begin) {
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, t = lane & 3;
  const int dim = half * 256 + warp * 16 + 2 * (lane >> 2);
  std::uint8_t* base = static_cast<std::uint8_t*>(p.out) + item.request * p.out_stride.batch +
                       dim * (p.out_f32 ? 4 : 2);
#pragma unroll
  for (int n = 0; n < Traits::kRows / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * n + 2 * t + e;
      if (row_begin + row >= p.rows) continue;
      const float f = factors[t * 20 + 2 * n + e];
      std::uint8_t* to = base + s.out_offset[row];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float x = f == 0.0f ? 0.0f : o[m][4 * n + e] * f;
        const float y = f == 0.0f ? 0.0f : o[m][4 * n + 2 + e] * f;
        if (p.out_f32) {
          *reinterpret_cast<float2*>(to + m * 256) = make_float2(x, y);
        } else {
          *reinterpret_cast<std::uint32_t*>(to + m * 128) = cvt_bf16x2(x, y);
        }
      }
    }
  }
}

// What each split's O counts in the sum of each row, for the warpgroup's threads, and the row's
// lse.
template <class Traits, class Storage>
__device__ __forceinline__ void weigh_splits(const DecodeParams& p, Storage& s,
                                             const DecodeItem& item, int half, int row_begin) {
  const int row = threadIdx.x & 127, global_row = row_begin + row;
  if (row < Traits::kRows) {
    RowState state[kMergeSplits];
    float maximum = kNoReference, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMergeSplits; ++i) {
      state[i] = {kNoReference, 0.0f};
      if (i < item.splits && global_row < p.rows) {
        const float2 pair =
            __ldcg(reinterpret_cast<const float2*>(row_state(p, item.first_slot + i, global_row)));
        state[i] = {pair.x, pair.y};
      }
      maximum = fmaxf(maximum, state[i].reference);
    }
#pragma unroll
    for (int i = 0; i < kMergeSplits; ++i) {
      state[i].reference = ex2_approx_ftz(state[i].reference - maximum);
      sum = fmaf(state[i].reference, state[i].sum, sum);  // NaN in any l reaches the output
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int i = 0; i < kMergeSplits; ++i)
      s.merge_weight[half][i][row_float(row)] = state[i].reference * inverse;
    s.merge_weight[half][kMergeSplits][row_float(row)] = 1.0f;
    if (half == 0 && p.lse && global_row < p.rows) {
      p.lse[item.request * p.lse_batch_stride + s.lse_offset[row]] =
          sum == 0.0f ? -INFINITY : 0.69314718055994530942f * (maximum + log2f(sum));
    }
  }
  barrier_sync(1 + half, 128);
}

// A partial result goes to the workspace. Where a request has 2 or 3 of them, whoever comes last
// merges all into its `o` and returns true; more are left to combine. The sum runs in the order of
// the splits, whoever makes it, so that a result does not depend on who was last. The counter goes
// back to 0 for the next launch under the same plan.
template <class Traits, class Storage>
__device__ __forceinline__ bool merge_splits(const DecodeParams& p, Storage& s,
                                             const DecodeItem& item,
                                             float (&o)[4][Traits::kRows / 2], int half,
                                             int row_begin) {
  constexpr int kRows = Traits::kRows;
  const int thread = threadIdx.x & 127, t = threadIdx.x & 3;
  const int first = item.first_slot, count = item.splits;
  const int row_tiles = (p.rows + kRows - 1) / kRows;
  std::int32_t* arrivals = p.plan.arrivals +
                           (static_cast<std::int64_t>(first) * row_tiles + row_begin / kRows) * 2 +
                           half;
  if (count <= kMergeSplits) {
    if (thread == 0) {
      s.arrived[half] = *reinterpret_cast<volatile std::int32_t*>(arrivals);
      __threadfence();
    }
    barrier_sync(1 + half, 128);
  }
  if (count > kMergeSplits || s.arrived[half] != count - 1) {
    float4* to = fragments(p, item.slot, row_begin, half, kRows) + thread;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
        to[fragment_at(m, n, kRows)] =
            make_float4(o[m][4 * n], o[m][4 * n + 1], o[m][4 * n + 2], o[m][4 * n + 3]);
    if (count > kMergeSplits) return false;
    __threadfence();
    barrier_sync(1 + half, 128);
    if (thread == 0) {
      s.arrived[half] = atomicAdd(arrivals, 1);
      __threadfence();
    }
    barrier_sync(1 + half, 128);
    if (s.arrived[half] != count - 1) return false;
  }
  if (thread == 0) *arrivals = 0;
  weigh_splits<Traits>(p, s, item, half, row_begin);
  const int own = item.slot - first;
  const int one = own == 0 ? 1 : 0, two = own == 2 ? 1 : 2;  // the others, in order
  const float4* from_one = fragments(p, first + one, row_begin, half, kRows) + thread;
  const float4* from_two = fragments(p, first + two, row_begin, half, kRows) + thread;
  const float* weights = s.merge_weight[half][0] + t * 20;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    float4 a[4], b[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      a[m] = __ldcg(from_one + fragment_at(m, n, kRows));
      b[m] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    if (count == 3) {
#pragma unroll
      for (int m = 0; m < 4; ++m) b[m] = __ldcg(from_two + fragment_at(m, n, kRows));
    }
    float2 w[kMergeSplits];
#pragma unroll
    for (int i = 0; i < kMergeSplits; ++i)
      w[i] = *reinterpret_cast<const float2*>(weights + i * kRowFloats + n * 2);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const auto merge = [&](float mine, float x, float y, float w0, float w1, float w2) {
        const float first_one = own == 0 ? mine : x;
        const float second = own == 0 ? x : own == 1 ? mine : y;
        const float third = own == 2 ? mine : y;
        return fmaf(w2, third, fmaf(w1, second, w0 * first_one));
      };
      float* x = &o[m][4 * n];
      x[0] = merge(x[0], a[m].x, b[m].x, w[0].x, w[1].x, w[2].x);
      x[1] = merge(x[1], a[m].y, b[m].y, w[0].y, w[1].y, w[2].y);
      x[2] = merge(x[2], a[m].z, b[m].z, w[0].x, w[1].x, w[2].x);
      x[3] = merge(x[3], a[m].w, b[m].w, w[0].y, w[1].y, w[2].y);
    }
  }
  barrier_sync(1 + half, 128);  // before the weights are written again
  return true;
}

}  // namespace fp8_decode
}  // namespace snapmla::cuda
