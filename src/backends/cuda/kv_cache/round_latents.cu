// round_latents: the rounding with feedback of snapmla/kv_rounding.h, the same bits.
//
// A block of 512 threads holds kTokens tokens, thread i place i of their order. Eight times, from
// the last 64 places to the first: the threads of these places decide, all earlier ones take the
// errors off their targets, in the order of places. The matrix is what is read most, 0.46 MB per
// block of threads from L2; each half of a block's rows is in registers before it is needed.
//
// Built with -fmad=false: numeric/ decides the bits, and host and device must agree.
// PTXAS: no-spill
#include "backends/cuda/kv_cache/views.h"
#include "backends/cuda/launch.h"
#include "ops/rounding.h"

namespace snapmla::cuda {
namespace {

constexpr int kN = kKvLoraRank, kBlock = ops::kFeedbackBlock, kHalf = kBlock / 2;
constexpr int kWarps = kN / kLanes;

struct RoundParams {
  float* latent;
  const float* rope;
  std::int64_t latent_stride, rope_stride;
  const std::int32_t* order;
  const float* matrix;
  std::int64_t tokens;
  ScaleMode mode;
};

// Rows first .. first + kHalf of the matrix, this thread's column.
__device__ __forceinline__ void load_rows(float (&u)[kHalf], const float* column, int first) {
#pragma unroll
  for (int j = 0; j < kHalf; ++j) u[j] = __ldg(column + (first + j) * kN);
}

template <int kTokens>
__global__ void __launch_bounds__(kN) round_kernel(const __grid_constant__ RoundParams p) {
  __shared__ std::uint32_t amaxes[kTokens][2][kWarps];
  __shared__ float errors[2][kTokens][kBlock];
  const int place = static_cast<int>(threadIdx.x), mine = place / kBlock, at = place % kBlock;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTokens;
  const std::int32_t element = p.order[place];
  const float* column = p.matrix + place;
  float u[kHalf], w[kHalf];
  // Weights do not wait for the kernel before.
  if (mine < kN / kBlock - 1) load_rows(u, column, kN - kBlock);
  wait_for_previous();

  float value[kTokens], target[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    value[t] = first + t < p.tokens ? p.latent[(first + t) * p.latent_stride + element] : 0.0f;
    const float rope = place < kQkRopeHeadDim && first + t < p.tokens
                           ? p.rope[(first + t) * p.rope_stride + place]
                           : 0.0f;
    const std::uint32_t a = __reduce_max_sync(0xffffffffu, magnitude(value[t]));
    const std::uint32_t r = __reduce_max_sync(0xffffffffu, magnitude(rope));
    if (place % kLanes == 0) {
      amaxes[t][0][place / kLanes] = a;
      amaxes[t][1][place / kLanes] = r;
    }
  }
  __syncthreads();
  float scale[kTokens];
  unsigned largest = 0, left_alone = 0;  // a bit per token
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    Amax a;
    for (int i = 0; i < kWarps; ++i) {
      a.latent = max(a.latent, amaxes[t][0][i]);
      a.rope = max(a.rope, amaxes[t][1][i]);
    }
    scale[t] = scale_of(a, p.mode);
    // The largest element decides the scale, so it is rounded by itself.
    if (magnitude(value[t]) == a.latent) largest |= 1u << t;
    if (a.latent == 0 || scale[t] != scale[t] || first + t >= p.tokens) left_alone |= 1u << t;
    target[t] = value[t] = value[t] / scale[t];
  }

  const auto decide = [&](int block) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float want = largest >> t & 1 ? value[t] : target[t];
      const float code = numeric::e4m3_to_float(numeric::e4m3_from_float(want));
      errors[block % 2][t][at] = code - value[t];
      if (!(left_alone >> t & 1))
        p.latent[(first + t) * p.latent_stride + element] = code * scale[t];
    }
  };
  const auto subtract = [&](const float(&rows)[kHalf], int block, int from) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int j = 0; j < kHalf; ++j) target[t] -= errors[block % 2][t][from + j] * rows[j];
    }
  };
  for (int block = kN / kBlock - 1; block > 0; --block) {
    if (mine < block) load_rows(w, column, block * kBlock + kHalf);
    if (mine == block) decide(block);
    __syncthreads();
    if (mine < block) subtract(u, block, 0);
    if (mine < block - 1) load_rows(u, column, (block - 1) * kBlock);
    if (mine < block) subtract(w, block, kHalf);
  }
  if (mine == 0) decide(0);
}

}  // namespace

void round_latents(const RoundLatentsArgs& a, Stream stream) {
  ops::check_args(a);
  require_device();
  const std::int64_t tokens = a.latent.dim(0);
  if (tokens == 0) return;
  const RoundParams p{a.latent.data<float>(),
                      a.rope.data<const float>(),
                      a.latent.stride(0),
                      a.rope.stride(0),
                      a.feedback.order.data<const std::int32_t>(),
                      a.feedback.matrix.data<const float>(),
                      tokens,
                      a.scale_mode};
  const auto run = [&](auto kernel, int per_block) {
    launch("round_latents", Ordering::kOverlap, kernel,
           dim3(blocks_for("round_latents", tokens, per_block)), dim3(kN), 0, stream, p);
  };
  // PERF: one wave of blocks takes 14 us (cold) with a token each and 15 with two, the time that
  // the matrix takes to arrive; a second wave with two takes 26, four a block at once 20.
  if (tokens <= 64) {
    run(round_kernel<1>, 1);
  } else if (tokens <= 264) {
    run(round_kernel<2>, 2);
  } else {
    run(round_kernel<4>, 4);
  }
}

}  // namespace snapmla::cuda
