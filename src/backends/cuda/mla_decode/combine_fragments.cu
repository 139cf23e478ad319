// Merges the FP8 kernel's partial results where the plan leaves them to it, and writes empty
// requests. With R_s, l_s and O_s of split s (fragments.h):
//
//   m = max_s R_s,  w_s = 2^(R_s - m),  O = sum_s w_s O_s / sum_s w_s l_s,
//   lse = ln 2 (m + log2 sum_s w_s l_s);  no token: O = 0, lse = -inf
//
// The work is cut into blocks of 8 rows x 64, 32 or 16 dims and groups of 128, 64 or 32 threads, a
// float4 of a partial result per thread. Where a request may have many splits, several groups share
// a block, each takes every kSharing-th split, and they meet; otherwise each group takes a block of
// its own. What counts with few requests is how many partial results are on their way at a time:
// narrow blocks give them more CTAs and more groups.
// PTXAS: no-spill
#include <algorithm>

#include "backends/cuda/launch.h"
#include "backends/cuda/mla_decode/combine.h"
#include "backends/cuda/mla_decode/cutting.h"
#include "backends/cuda/mla_decode/fragments.h"
#include "backends/cuda/ptx/convert.h"
#include "backends/cuda/ptx/math.h"
#include "backends/cuda/ptx/pdl.h"

namespace snapmla::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kEnough = 12;        // splits per group: fewer are not worth another group
constexpr int kWaveGroups = 1024;  // groups of 128 threads that run at once, about
constexpr unsigned kManyCtas = 384;

// kGroup: threads of a group. kSharing: groups that share a block. kAhead: partial results in
// flight per thread. kCtas: of an SM.
template <int kGroup_, int kSharing_, int kAhead_, int kCtas_>
struct Traits {
  static constexpr int kGroup = kGroup_, kSharing = kSharing_, kAhead = kAhead_, kCtas = kCtas_;
  static constexpr int kSharers = kGroup * kSharing;
  static constexpr int kBlocks = kThreads / kSharers;
  // Of splits that a thread weighs at once: registers.
  static constexpr int kStates = kCtas == 1 ? 3 : kSharing > 1 ? 2 : 1;
  static constexpr int kWeighed = kSharers / 8 * kStates;  // splits whose weights fit at a time
};

template <class T>
struct Shared {
  static constexpr int kGroup = T::kGroup, kSharing = T::kSharing, kSharers = T::kSharers;
  static constexpr int kBlocks = T::kBlocks, kWeighed = T::kWeighed;
  float maximum[kBlocks][kSharers / 32][8], row_maximum[kBlocks][8];
  float weight[kBlocks][kWeighed][8], share[kBlocks][kWeighed][8];  // of O; of l
  float4 o[kBlocks][kSharing][kGroup];
  float2 sum[kBlocks][kSharing][kGroup];
};

// A block's place: row tile of 1 << log_width rows, half of the dims, m, n and the first of its
// threads; see fragments.h.
struct Block {
  int row_begin, half, m, n, first_thread;
  __device__ Block(int index, int log_width, int group_threads) {
    const int slices = 128 / group_threads;
    first_thread = index % slices * group_threads;
    index /= slices;
    n = index & ((1 << (log_width - 3)) - 1);
    index >>= log_width - 3;
    m = index % 4;
    half = index / 4 % 2;
    row_begin = index / 8 << log_width;
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

// Threads of a block: `sharer` of kSharing * kGroup, `place` in the CTA.
template <class T>
__device__ void combine_block(const DecodeParams& p, Shared<T>& s, int log_width, int request,
                              int first, int count) {
  constexpr int kSharers = T::kSharers, kSharing = T::kSharing, kGroup = T::kGroup;
  constexpr int kWeighed = T::kWeighed, kAhead = T::kAhead, kStates = T::kStates;
  const int sharer = static_cast<int>(threadIdx.x) % kSharers, group = sharer / kGroup;
  const int place = static_cast<int>(threadIdx.x) / kSharers, own = sharer % kGroup;
  const Block b(static_cast<int>(blockIdx.x) * T::kBlocks + place, log_width, kGroup);
  const int thread = b.first_thread + own;  // of the 128 that hold the fragment
  // A narrow plan may have fewer blocks than there are places.
  if (b.row_begin >= p.rows) count = 0;
  const int width = 1 << log_width;
  const float4* from =
      fragments(p, first, b.row_begin, b.half, width) + fragment_at(b.m, b.n, width) + thread;
  const std::int64_t split_stride = static_cast<std::int64_t>(p.slot_rows) * 128;  // float4
  float4 x[kAhead];
  const auto load = [&](int split) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = split + k * kSharing;
      if (at < count) x[k] = __ldcg(from + at * split_stride);
    }
  };
  load(group);  // the weights are made meanwhile

  // Sharer i weighs row i % 8 of splits i / 8, + kSharers / 8, ...
  const int own_row = sharer & 7, row = b.row_begin + 8 * b.n + own_row;
  const auto state_of = [&](int split) {
    return split < count && row < p.rows ? *row_state(p, first + split, row)
                                         : RowState{kNoReference, 0.0f};
  };
  RowState state[kStates];
  const auto load_states = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      state[i] = state_of(begin + (sharer >> 3) + i * (kSharers / 8));
  };
  load_states(0);
  float maximum = kNoReference;
#pragma unroll
  for (int i = 0; i < kStates; ++i) maximum = fmaxf(maximum, state[i].reference);
  for (int split = kWeighed + (sharer >> 3); split < count; split += kSharers / 8)
    maximum = fmaxf(maximum, state_of(split).reference);
  maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 8));
  maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 16));
  if ((sharer & 31) < 8) s.maximum[place][sharer >> 5][own_row] = maximum;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kSharers / 32; ++w) maximum = fmaxf(maximum, s.maximum[place][w][own_row]);
  if (sharer < 8) s.row_maximum[place][own_row] = maximum;

  const int t = thread & 3;
  float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float2 sum = make_float2(0.0f, 0.0f);
  for (int begin = 0; begin < count; begin += kWeighed) {
    if (begin > 0) {
      load_states(begin);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int at = (sharer >> 3) + i * (kSharers / 8);
      const float weight = ptx::ex2_approx_ftz(state[i].reference - maximum);
      s.weight[place][at][own_row] = weight;
      s.share[place][at][own_row] = weight * state[i].sum;  // NaN in any l reaches the output
    }
    __syncthreads();
    const int end = min(count, begin + kWeighed);
    for (int split = begin + group; split < end; split += kAhead * kSharing) {
      if (split != group) load(split);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int at = split + k * kSharing;
        if (at >= end) continue;
        const float2 w = *reinterpret_cast<const float2*>(&s.weight[place][at - begin][2 * t]);
        const float2 l = *reinterpret_cast<const float2*>(&s.share[place][at - begin][2 * t]);
        o.x = fmaf(w.x, x[k].x, o.x);
        o.y = fmaf(w.y, x[k].y, o.y);
        o.z = fmaf(w.x, x[k].z, o.z);
        o.w = fmaf(w.y, x[k].w, o.w);
        sum.x += l.x;
        sum.y += l.y;
      }
    }
  }
  if constexpr (kSharing > 1) {
    s.o[place][group][own] = o;
    s.sum[place][group][own] = sum;
  }
  __syncthreads();
  if (group == 0) {
#pragma unroll
    for (int g = 1; g < kSharing; ++g) {
      if (g >= count) break;  // had no split
      const float4 other = s.o[place][g][own];
      o = make_float4(o.x + other.x, o.y + other.y, o.z + other.z, o.w + other.w);
      sum = make_float2(sum.x + s.sum[place][g][own].x, sum.y + s.sum[place][g][own].y);
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
            l == 0.0f ? -INFINITY
                      : 0.69314718055994530942f * (s.row_maximum[place][2 * t + e] + log2f(l));
      }
    }
  }
  __syncthreads();  // before the next request writes shared memory
}

// Grid (blocks, some): over the plan's list.
template <class T>
__global__ void __launch_bounds__(kThreads, T::kCtas)
    combine_fragments_kernel(const __grid_constant__ DecodeParams p) {
  __shared__ Shared<T> s;
  // The decode kernel lets this one start only when the plan is there: nothing to wait for yet.
  const int num_merges = __ldcg(p.plan.num_merges);
  int i = static_cast<int>(blockIdx.y);
  // Both at once: the grid has at most `batch` rows.
  const int4 first = __ldcg(reinterpret_cast<const int4*>(p.plan.merges + i));
  DecodeMerge merge{first.x, first.y, first.z, first.w};
  const bool narrow = p.narrow_tiles > 0 && __ldcg(p.plan.narrow) != 0;
  const int log_width = __ffs(narrow ? kNarrowTile : p.row_width) - 1;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  while (i < num_merges) {
    combine_block<T>(p, s, log_width, merge.request, merge.first_slot, merge.splits);
    i += static_cast<int>(gridDim.y);
    if (i < num_merges) merge = p.plan.merges[i];
  }
}

// `blocks` of 8 rows x 64 dims.
template <class T>
void launch_as(const DecodeParams& p, unsigned blocks, cudaStream_t stream) {
  const auto requests = static_cast<unsigned>(p.batch);
  const unsigned ctas = blocks * (128 / T::kGroup) / T::kBlocks;
  // With many requests most are usually merged by the decode kernel: few CTAs start sooner.
  const unsigned most = requests <= 16 ? requests : std::clamp(kManyCtas / ctas, 1u, requests);
  launch("combine", Ordering::kOverlap, combine_fragments_kernel<T>, dim3(ctas, most),
         dim3(kThreads), 0, stream, p);
}

}  // namespace

void launch_combine_fragments(const DecodeParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(p.row_tiles * p.row_width);  // 8 rows x 64 dims each
  // The order of sums must not depend on the batch.
  if (p.deterministic) return launch_as<Traits<128, 4, 4, 2>>(p, blocks, stream);
  // Of equal requests: more only takes longer.
  const int splits = std::min(p.parts / p.batch + 1, p.max_tiles);
  const std::int64_t all = std::int64_t{p.batch} * blocks;
  // Groups share where they would have many splits, and where there are not enough blocks for all
  // SMs. PERF: narrow blocks for few requests in many pieces: 4 to 16 loads of a thread, one round
  // or two of them, instead of up to nine rounds on a part of the SMs (variant 74).
  if (splits > 48 && all <= 32) return launch_as<Traits<32, 16, 9, 1>>(p, blocks, stream);
  if (splits > 24 && all <= 64) return launch_as<Traits<64, 8, 9, 1>>(p, blocks, stream);
  if (splits > 24 && all <= 128) return launch_as<Traits<64, 8, 4, 2>>(p, blocks, stream);
  const auto sharing_pays = [&](int sharing) {
    return splits > sharing / 2 * kEnough || all * sharing <= kWaveGroups;
  };
  // For up to 8 splits two groups do: one request of 640 tokens 8.8 -> 8.4 us at 128 rows.
  if (splits > 8 && sharing_pays(4)) return launch_as<Traits<128, 4, 4, 2>>(p, blocks, stream);
  if (sharing_pays(2)) return launch_as<Traits<128, 2, 4, 2>>(p, blocks, stream);
  launch_as<Traits<128, 1, 4, 2>>(p, blocks, stream);
}

}  // namespace snapmla::cuda
