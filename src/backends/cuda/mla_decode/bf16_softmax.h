// Online softmax of the BF16 decode kernel: 64 rows x 64 tokens in the registers of a warpgroup.
//
//   P = bf16(2^(x - R)),  x = score * softmax_scale * log2 e,  l = sum P,  O = sum P V
//
// R is a LAZY reference per row: the first maximum that the row meets, moved only when a lane's
// share of a page's sum exceeds kMaxSum. bf16 and f32 have the same exponent range, so P much above
// 1 costs no precision; in exchange the maximum is not computed, O is practically never rescaled,
// and the P of one page does not wait for the maximum of the next.
//
// Two sums are kept. Numerator and denominator of the output use the ROUNDED P, so that the
// rounding of a dominant token cancels (with the exact sum a peaked row is off by up to 2^-9). The
// lse uses the f32 sum: there nothing would cancel, and the rounded one is off by the same 2^-9.
#pragma once

#include <cstdint>

#include "backends/cuda/ptx/convert.h"
#include "backends/cuda/ptx/math.h"

namespace snapmla::cuda::bf16_decode {

inline constexpr float kMaxSum = 65536.0f;
inline constexpr unsigned kAllLanes = ~0u;

// Of the lane's rows g and g + 8; the sums are over the lane's own columns.
struct RowPair {
  float reference[2];
  float sum[2], rounded_sum[2];
};

__device__ __forceinline__ void reset(RowPair& rows) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.reference[r] = -INFINITY;
    rows.sum[r] = rows.rounded_sum[r] = 0.0f;
  }
}

// Moves the references up to `target`; returns 2^(old - new), 1 where a row stays.
__device__ __forceinline__ float2 move_reference(RowPair& rows, float target0, float target1) {
  const float target[2] = {target0, target1};
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool up = target[r] > rows.reference[r];
    factor[r] = up ? ptx::ex2_approx_ftz(rows.reference[r] - target[r]) : 1.0f;
    if (up) rows.reference[r] = target[r];
    rows.sum[r] *= factor[r];
    rows.rounded_sum[r] *= factor[r];
  }
  return make_float2(factor[0], factor[1]);
}

// Moves the references to the maxima of a page's scores. NaN scores do not count.
__device__ __forceinline__ float2 raise_reference(const float (&score)[32], RowPair& rows,
                                                  float scale) {
  float m[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < 32; ++i) m[(i >> 1) & 1] = fmaxf(m[(i >> 1) & 1], score[i] * scale);
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
    m[0] = fmaxf(m[0], __shfl_xor_sync(kAllLanes, m[0], d));
    m[1] = fmaxf(m[1], __shfl_xor_sync(kAllLanes, m[1], d));
  }
  return move_reference(rows, m[0], m[1]);
}

struct PageSums {
  float sum[2], rounded[2];
};

__device__ __forceinline__ PageSums exponentials(const float (&score)[32], std::uint32_t (&p)[4][4],
                                                 const RowPair& rows, float scale) {
  // A row that has met no key yet: x is -inf (masked) or NaN throughout, and P 0 or NaN.
  const float shift[2] = {rows.reference[0] == -INFINITY ? 0.0f : -rows.reference[0],
                          rows.reference[1] == -INFINITY ? 0.0f : -rows.reference[1]};
  PageSums page{{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int r = i & 1;
    const float low = ptx::ex2_approx_ftz(fmaf(score[2 * i], scale, shift[r]));
    const float high = ptx::ex2_approx_ftz(fmaf(score[2 * i + 1], scale, shift[r]));
    const std::uint32_t pair = ptx::cvt_bf16x2(low, high);
    p[i >> 2][i & 3] = pair;
    page.sum[r] += low + high;
    page.rounded[r] += __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000u);
  }
  return page;
}

// Scores -> P and sums. Returns true if O must be multiplied by `rescale` before P V is added.
__device__ __forceinline__ bool online_softmax(const float (&score)[32], std::uint32_t (&p)[4][4],
                                               RowPair& rows, float scale, float2& rescale) {
  bool moved = false;
  if (__any_sync(kAllLanes, rows.reference[0] == -INFINITY || rows.reference[1] == -INFINITY)) {
    rescale = raise_reference(score, rows, scale);
    moved = true;
  }
  PageSums page = exponentials(score, p, rows, scale);
  if (__any_sync(kAllLanes, page.sum[0] > kMaxSum || page.sum[1] > kMaxSum)) {
    // The references are below the maxima, so they were not raised just now.
    rescale = raise_reference(score, rows, scale);
    moved = true;
    page = exponentials(score, p, rows, scale);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.sum[r] += page.sum[r];
    rows.rounded_sum[r] += page.rounded[r];
  }
  return moved;
}

// Keys at or past `visible` of a lane's two rows get -inf, by select: their scores may be NaN.
// `first_key`: key of the lane's first column.
__device__ __forceinline__ void mask_scores(float (&score)[32], int first_key,
                                            const int (&visible)[2]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int key = first_key + (i >> 2) * 8 + (i & 1);
    if (key >= visible[(i >> 1) & 1]) score[i] = -INFINITY;
  }
}

}  // namespace snapmla::cuda::bf16_decode
