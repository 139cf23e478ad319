// Merges the FP8 kernel's partial results where a request has more splits than that kernel merges
// itself, and writes empty requests. With R_s, l_s and O_s of split s (fragments.h):
//
//   m = max_s R_s,  w_s = 2^(R_s - m),  O = sum_s w_s O_s / sum_s w_s l_s,
//   lse = ln 2 (m + log2 sum_s w_s l_s);  no token: O = 0, lse = -inf
//
// A CTA takes one block of 8 rows x 64 dims of a request: four groups of 128 threads, each every
// fourth split, then the groups meet.
// PTXAS: no-spill
#include <algorithm>

#include "backends/cuda/launch.h"
#include "backends/cuda/mla_decode/combine.h"
#include "backends/cuda/mla_decode/fragments.h"
#include "backends/cuda/ptx/convert.h"
#include "backends/cuda/ptx/math.h"
#include "backends/cuda/ptx/pdl.h"

namespace snapmla::cuda {
namespace {

constexpr int kThreads = 512, kGroups = kThreads / 128;
constexpr int kWeighed = 128;  // splits whose weights fit in shared memory at a time
constexpr int kAhead = 4;      // partial results in flight per thread

struct Shared {
  float maximum[kThreads / 32][8], row_maximum[8];
  float weight[kWeighed][8], share[kWeighed][8];  // of O; of l
  float4 o[kGroups - 1][128];
  float2 sum[kGroups - 1][128];
};

// Block (row tile, half of the dims, m, n) of the CTA; see fragments.h.
template <int kRows>
struct Block {
  int row_begin, half, m, n;
  __device__ explicit Block(int index) {
    n = index % (kRows / 8);
    m = index / (kRows / 8) % 4;
    half = index / (kRows / 8) / 4 % 2;
    row_begin = index / (kRows / 8) / 8 * kRowTile;
  }
};

// Writes rows 8n + 2t, + 1 and dims d, d + 1 of this thread.
__device__ void write(const DecodeParams& p, int request, int row, int dim, const float4& o,
                      const float2& inverse) {
  const float values[2][2] = {{o.x * inverse.x, o.z * inverse.x},
                              {o.y * inverse.y, o.w * inverse.y}};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (row + e >= p.rows) continue;
    const RowPlace at(row + e, p.heads_q);
    std::uint8_t* out = static_cast<std::uint8_t*>(p.out) + request * p.out_stride.batch +
                        at.token * p.out_stride.token + at.head * p.out_stride.head;
    if (p.out_f32) {
      *reinterpret_cast<float2*>(out + dim * 4) = make_float2(values[e][0], values[e][1]);
    } else {
      *reinterpret_cast<std::uint32_t*>(out + dim * 2) =
          ptx::cvt_bf16x2(values[e][0], values[e][1]);
    }
  }
}

template <int kRows>
__device__ void combine_block(const DecodeParams& p, Shared& s, int request,
                              const Block<kRows>& b) {
  const int count = p.plan.split_count[request], first = p.plan.split_begin[request];
  if (count > 0 && count <= p.merge_splits) return;  // written by the decode kernel
  const int thread = static_cast<int>(threadIdx.x) & 127;
  const int group = static_cast<int>(threadIdx.x) >> 7;
  const float4* from =
      fragments<kRows>(p, first, b.row_begin, b.half) + fragment_at<kRows>(b.m, b.n) + thread;
  const std::int64_t split_stride = static_cast<std::int64_t>(p.slot_rows) * 128;  // float4
  float4 x[kAhead];
  const auto load = [&](int split) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = split + k * kGroups;
      if (at < count) x[k] = __ldcg(from + at * split_stride);
    }
  };
  load(group);  // the weights are made meanwhile

  // Thread i weighs row i % 8 of splits i / 8, + 64, ...
  const int row = b.row_begin + 8 * b.n + (static_cast<int>(threadIdx.x) & 7);
  const auto state_of = [&](int split) {
    return split < count && row < p.rows ? *row_state(p, first + split, row)
                                         : RowState{kNoReference, 0.0f};
  };
  float maximum = kNoReference;
  for (int split = static_cast<int>(threadIdx.x) >> 3; split < count; split += kThreads / 8)
    maximum = fmaxf(maximum, state_of(split).reference);
  maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 8));
  maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 16));
  if ((threadIdx.x & 31) < 8) s.maximum[threadIdx.x >> 5][threadIdx.x & 7] = maximum;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) maximum = fmaxf(maximum, s.maximum[w][threadIdx.x & 7]);

  const int t = thread & 3;
  float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float2 sum = make_float2(0.0f, 0.0f);
  for (int begin = 0; begin < count; begin += kWeighed) {
    if (begin > 0) __syncthreads();
    for (int i = static_cast<int>(threadIdx.x) >> 3; i < kWeighed; i += kThreads / 8) {
      const RowState state = state_of(begin + i);
      const float weight = ptx::ex2_approx_ftz(state.reference - maximum);
      s.weight[i][threadIdx.x & 7] = weight;
      s.share[i][threadIdx.x & 7] = weight * state.sum;  // NaN in any l reaches the output
    }
    __syncthreads();
    const int end = min(count, begin + kWeighed);
    for (int split = begin + group; split < end; split += kAhead * kGroups) {
      if (split != group) load(split);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int at = split + k * kGroups;
        if (at >= end) continue;
        const float2 w = *reinterpret_cast<const float2*>(&s.weight[at - begin][2 * t]);
        o.x = fmaf(w.x, x[k].x, o.x);
        o.y = fmaf(w.y, x[k].y, o.y);
        o.z = fmaf(w.x, x[k].z, o.z);
        o.w = fmaf(w.y, x[k].w, o.w);
        const float2 l = *reinterpret_cast<const float2*>(&s.share[at - begin][2 * t]);
        sum.x += l.x;
        sum.y += l.y;
      }
    }
  }
  if (group > 0) {
    s.o[group - 1][thread] = o;
    s.sum[group - 1][thread] = sum;
  }
  if (threadIdx.x < 8) s.row_maximum[threadIdx.x] = maximum;
  __syncthreads();
  if (group == 0) {
#pragma unroll
    for (int g = 0; g < kGroups - 1; ++g) {
      const float4 other = s.o[g][thread];
      o = make_float4(o.x + other.x, o.y + other.y, o.z + other.z, o.w + other.w);
      sum = make_float2(sum.x + s.sum[g][thread].x, sum.y + s.sum[g][thread].y);
    }
    const int first_row = b.row_begin + 8 * b.n + 2 * t, g = (thread & 31) >> 2;
    const float2 inverse =
        make_float2(sum.x == 0.0f ? 0.0f : 1.0f / sum.x, sum.y == 0.0f ? 0.0f : 1.0f / sum.y);
    write(p, request, first_row, b.half * 256 + b.m * 64 + (thread >> 5) * 16 + 2 * g, o, inverse);
    if (p.lse && b.half == 0 && b.m == 0 && thread < 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (first_row + e >= p.rows) continue;
        const float l = e == 0 ? sum.x : sum.y;
        const RowPlace at(first_row + e, p.heads_q);
        p.lse[request * p.lse_batch_stride + at.head * p.lse_head_stride +
              at.token * p.lse_token_stride] =
            l == 0.0f ? -INFINITY : 0.69314718055994530942f * (s.row_maximum[2 * t + e] + log2f(l));
      }
    }
  }
  __syncthreads();  // before the next request writes shared memory
}

// Few requests: blockIdx.y is one. Many: the plan's list of those that are left.
template <int kRows, bool kList>
__global__ void __launch_bounds__(kThreads)
    combine_fragments_kernel(const __grid_constant__ DecodeParams p) {
  __shared__ Shared s;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const Block<kRows> block(static_cast<int>(blockIdx.x));
  if constexpr (kList) {
    const int num_merged = *p.plan.num_merged;
    for (int i = static_cast<int>(blockIdx.y); i < num_merged; i += static_cast<int>(gridDim.y))
      combine_block<kRows>(p, s, p.plan.merged[i], block);
  } else {
    combine_block<kRows>(p, s, static_cast<int>(blockIdx.y), block);
  }
}

template <int kRows>
void launch_rows(const DecodeParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(p.row_tiles * 2 * 4 * (kRows / 8));
  const auto requests = static_cast<unsigned>(p.batch);
  if (requests <= 8) {
    launch("combine", Ordering::kOverlap, combine_fragments_kernel<kRows, false>,
           dim3(blocks, requests), dim3(kThreads), 0, stream, p);
  } else {
    // Most requests are merged by the decode kernel, often all: few CTAs start sooner.
    launch("combine", Ordering::kOverlap, combine_fragments_kernel<kRows, true>,
           dim3(blocks, std::clamp(512u / blocks, 1u, requests)), dim3(kThreads), 0, stream, p);
  }
}

}  // namespace

void launch_combine_fragments(const DecodeParams& p, cudaStream_t stream) {
  if (p.slot_rows == 16) return launch_rows<16>(p, stream);
  if (p.slot_rows == 32) return launch_rows<32>(p, stream);
  launch_rows<64>(p, stream);
}

}  // namespace snapmla::cuda
