// The end of an item: row sums of both warpgroups meet, O is divided and written.
#pragma once

#include "backends/cuda/mla_decode/bf16_softmax.h"
#include "backends/cuda/mla_decode/bf16_storage.h"
#include "backends/cuda/mla_decode/decode_params.h"
#include "backends/cuda/ptx/barrier.h"
#include "backends/cuda/ptx/convert.h"
#include "numeric/softmax.h"

namespace snapmla::cuda::bf16_decode {

// 128 dims of one row as f32. A quad of lanes writes 32 bytes at a time.
__device__ __forceinline__ void store_f32(float* to, const float (&o)[64], int r, int lane,
                                          float inverse, bool empty) {
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const float low = empty ? 0.0f : o[4 * n + 2 * r] * inverse;
    const float high = empty ? 0.0f : o[4 * n + 2 * r + 1] * inverse;
    *reinterpret_cast<float2*>(to + 8 * n + 2 * (lane & 3)) = make_float2(low, high);
  }
}

// 128 dims of one row as bf16. Neighbouring lanes swap halves of two column blocks, so that a quad
// writes 32 bytes at a time. All lanes take part in the swap; `to` is null where there is no row.
__device__ __forceinline__ void store_bf16(std::uint8_t* to, const float (&o)[64], int r, int lane,
                                           float inverse, bool empty) {
  const bool odd = (lane & 1) != 0;
#pragma unroll
  for (int n = 0; n < 16; n += 2) {
    std::uint32_t pair[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float low = empty ? 0.0f : o[4 * (n + e) + 2 * r] * inverse;
      const float high = empty ? 0.0f : o[4 * (n + e) + 2 * r + 1] * inverse;
      pair[e] = ptx::cvt_bf16x2(low, high);
    }
    const std::uint32_t other = __shfl_xor_sync(kAllLanes, odd ? pair[0] : pair[1], 1);
    const uint2 words = odd ? make_uint2(other, pair[1]) : make_uint2(pair[0], other);
    const int column = 8 * (n + (odd ? 1 : 0)) + 4 * ((lane & 3) >> 1);
    if (to != nullptr) *reinterpret_cast<uint2*>(to + 2 * column) = words;
  }
}

// kHalf: the warpgroup, and its half of the output dims.
template <int kHalf>
__device__ __forceinline__ void store_item(const DecodeParams& p, SharedStorage& s,
                                           const DecodeItem& item, const float (&o)[2][64],
                                           const RowPair& rows, int row_begin,
                                           std::uint32_t item_parity) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int first_row = ((static_cast<int>(threadIdx.x) & 127) >> 5) * 16 + (lane >> 2);
  float sum[2], rounded[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] = rows.sum[r];
    rounded[r] = rows.rounded_sum[r];
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], d);
      rounded[r] += __shfl_xor_sync(kAllLanes, rounded[r], d);
    }
    if ((lane & 3) == 0)
      s.row_sums[item_parity][kHalf][first_row + 8 * r] = make_float2(sum[r], rounded[r]);
  }
  s.hand_over.sync(kItemDone, 256);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float2 other = s.row_sums[item_parity][1 - kHalf][first_row + 8 * r];
    sum[r] += other.x;
    rounded[r] += other.y;
    const bool empty = rounded[r] == 0.0f;
    const float inverse = 1.0f / rounded[r];
    const float lse2 = sum[r] == 0.0f ? -INFINITY : rows.reference[r] + log2f(sum[r]);
    const int row = row_begin + first_row + 8 * r;
    const bool exists = row < p.rows;
    const int token = row / p.heads_q, head = row - token * p.heads_q;
    if (item.slot >= 0) {
      const std::int64_t slot = item.slot;
      if (!exists) continue;
      if (kHalf == 0 && (lane & 3) == 0) p.plan.lse_accum[slot * p.rows + row] = lse2;
      float* to = p.plan.out_accum + (slot * p.slot_rows + row) * 512 + kHalf * 256;
#pragma unroll
      for (int h = 0; h < 2; ++h) store_f32(to + h * 128, o[h], r, lane, inverse, empty);
      continue;
    }
    if (kHalf == 0 && (lane & 3) == 0 && exists && p.lse != nullptr) {
      p.lse[item.request * p.lse_batch_stride + head * p.lse_head_stride +
            token * p.lse_token_stride] = lse2 * numeric::kLn2;
    }
    std::uint8_t* to = static_cast<std::uint8_t*>(p.out) + item.request * p.out_stride.batch +
                       token * p.out_stride.token + head * p.out_stride.head;
    if (p.out_f32) {
      if (!exists) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        store_f32(reinterpret_cast<float*>(to) + kHalf * 256 + h * 128, o[h], r, lane, inverse,
                  empty);
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        store_bf16(exists ? to + 2 * (kHalf * 256 + h * 128) : nullptr, o[h], r, lane, inverse,
                   empty);
    }
  }
}

}  // namespace snapmla::cuda::bf16_decode
