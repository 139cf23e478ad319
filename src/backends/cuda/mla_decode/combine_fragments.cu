// Merges the FP8 kernel's partial results where the plan leaves them to it, and writes empty
// requests. With R_s, l_s and O_s of split s (fragments.h):
//
//   m = max_s R_s,  w_s = 2^(R_s - m),  O = sum_s w_s O_s / sum_s w_s l_s,
//   lse = ln 2 (m + log2 sum_s w_s l_s);  no token: O = 0, lse = -inf
//
// The work is cut into blocks of 8 rows x 64 dims and groups of 128 threads. Where a request may
// have many splits, several groups share a block, each takes every kSharing-th split, and they
// meet; otherwise each group takes a block of its own.
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

constexpr int kThreads = 512, kGroups = kThreads / 128;
constexpr int kAhead = 4;          // partial results in flight per thread
constexpr int kEnough = 12;        // splits per group: fewer are not worth another group
constexpr int kWaveGroups = 1024;  // groups that run at once, about
constexpr unsigned kManyCtas = 384;

// kSharing: groups that share a block.
template <int kSharing>
struct Shared {
  static constexpr int kBlocks = kGroups / kSharing;
  static constexpr int kWeighed = 32 * kSharing;  // splits whose weights fit at a time
  float maximum[kBlocks][kSharing * 4][8], row_maximum[kBlocks][8];
  float weight[kBlocks][kWeighed][8], share[kBlocks][kWeighed][8];  // of O; of l
  float4 o[kBlocks][kSharing][128];
  float2 sum[kBlocks][kSharing][128];
};

// A block's place: row tile of 1 << log_width rows, half of the dims, m, n; see fragments.h.
struct Block {
  int row_begin, half, m, n;
  __device__ Block(int index, int log_width) {
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

// Threads of a block: `sharer` of kSharing * 128, `place` in the CTA.
template <int kSharing>
__device__ void combine_block(const DecodeParams& p, Shared<kSharing>& s, int log_width,
                              int request, int first, int count) {
  constexpr int kSharers = kSharing * 128, kWeighed = Shared<kSharing>::kWeighed;
  const int thread = static_cast<int>(threadIdx.x) & 127;
  const int sharer = static_cast<int>(threadIdx.x) % kSharers, group = sharer >> 7;
  const int place = static_cast<int>(threadIdx.x) / kSharers;
  const Block b(static_cast<int>(blockIdx.x) * Shared<kSharing>::kBlocks + place, log_width);
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
  float maximum = kNoReference;
  for (int split = sharer >> 3; split < count; split += kSharers / 8)
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
    if (begin > 0) __syncthreads();
    for (int i = sharer >> 3; i < kWeighed && begin + i < count; i += kSharers / 8) {
      const RowState state = state_of(begin + i);
      const float weight = ptx::ex2_approx_ftz(state.reference - maximum);
      s.weight[place][i][own_row] = weight;
      s.share[place][i][own_row] = weight * state.sum;  // NaN in any l reaches the output
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
    s.o[place][group][thread] = o;
    s.sum[place][group][thread] = sum;
  }
  __syncthreads();
  if (group == 0) {
#pragma unroll
    for (int g = 1; g < kSharing; ++g) {
      const float4 other = s.o[place][g][thread];
      o = make_float4(o.x + other.x, o.y + other.y, o.z + other.z, o.w + other.w);
      sum = make_float2(sum.x + s.sum[place][g][thread].x, sum.y + s.sum[place][g][thread].y);
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
template <int kSharing>
__global__ void __launch_bounds__(kThreads, 2)
    combine_fragments_kernel(const __grid_constant__ DecodeParams p) {
  __shared__ Shared<kSharing> s;
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
    combine_block(p, s, log_width, merge.request, merge.first_slot, merge.splits);
    i += static_cast<int>(gridDim.y);
    if (i < num_merges) merge = p.plan.merges[i];
  }
}

template <int kSharing>
void launch_sharing(const DecodeParams& p, unsigned blocks, cudaStream_t stream) {
  const auto requests = static_cast<unsigned>(p.batch);
  const unsigned ctas = blocks / Shared<kSharing>::kBlocks;
  // With many requests most are usually merged by the decode kernel: few CTAs start sooner.
  const unsigned most = requests <= 16 ? requests : std::clamp(kManyCtas / ctas, 1u, requests);
  launch("combine", Ordering::kOverlap, combine_fragments_kernel<kSharing>, dim3(ctas, most),
         dim3(kThreads), 0, stream, p);
}

}  // namespace

void launch_combine_fragments(const DecodeParams& p, cudaStream_t stream) {
  // Of equal requests: more only takes longer. Groups share where they would have many splits, and
  // where there are not enough blocks for all SMs.
  const int splits = std::min(p.parts / p.batch + 1, p.max_tiles);
  const auto blocks = static_cast<unsigned>(p.row_tiles * p.row_width);  // 8 rows x 64 dims each
  const auto sharing_pays = [&](int sharing) {
    return splits > sharing / 2 * kEnough ||
           std::int64_t{p.batch} * blocks * sharing <= kWaveGroups;
  };
  if (p.deterministic || sharing_pays(4)) return launch_sharing<4>(p, blocks, stream);
  if (sharing_pays(2)) return launch_sharing<2>(p, blocks, stream);
  launch_sharing<1>(p, blocks, stream);
}

}  // namespace snapmla::cuda
