// mla_decode over an F32 cache, the validation format: one block per (request, token, head), tiles
// of 64 keys in order, everything in f32. Slow and simple.
// PTXAS: no-spill
#include "backends/cuda/kv_cache/views.h"
#include "backends/cuda/launch.h"
#include "backends/cuda/model/dot.h"
#include "numeric/softmax.h"

namespace snapmla::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kDimsPerThread = kKvLoraRank / kThreads;

struct DecodeF32Params {
  RowsView q_latent, q_rope, out;  // strides in elements
  float* lse;                      // or null
  std::int64_t lse_batch, lse_head, lse_token;
  CacheParams cache;
  const std::int32_t *table, *lengths;
  std::int64_t table_stride;
  std::int32_t heads, seqlen_q;
  float scale_log2e;
  bool out_bf16;
};

// q . k of one token, in every lane.
__device__ __forceinline__ float score(const LaneRow& q, const LaneRow& k) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum = fmaf(q.latent[i], k.latent[i], sum);
  sum = fmaf(q.rope[0], k.rope[0], sum);
  sum = fmaf(q.rope[1], k.rope[1], sum);
  return warp_sum(sum);
}

__global__ void __launch_bounds__(kThreads)
    decode_f32_kernel(const __grid_constant__ DecodeF32Params p) {
  __shared__ float logits[kPageSize];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes, warp = thread / kLanes;
  const std::int64_t h = blockIdx.x % p.heads, token = blockIdx.x / p.heads;
  const std::int64_t s = token % p.seqlen_q, b = token / p.seqlen_q;
  const std::int64_t visible = static_cast<std::int64_t>(p.lengths[b]) - p.seqlen_q + s + 1;
  const LaneRow q = load_row(p.q_latent.at<float>(b, s, h), p.q_rope.at<float>(b, s, h), lane);

  float out[kDimsPerThread] = {}, maximum = -INFINITY, sum = 0;
  for (std::int64_t t = 0; t < visible; t += kPageSize) {
    const int count = static_cast<int>(min(visible - t, std::int64_t{kPageSize}));
    const std::int64_t page = p.table[b * p.table_stride + t / kPageSize];
    for (int j = warp; j < count; j += kWarps) {
      const float x = score(q, load_f32(p.cache.row(page, j), lane)) * p.scale_log2e;
      if (lane == 0) logits[j] = x;
    }
    __syncthreads();
    // Every warp looks at all logits of the tile: the same numbers in the same order.
    const float a = lane < count ? logits[lane] : -INFINITY;
    const float c = lane + kLanes < count ? logits[lane + kLanes] : -INFINITY;
    const float above = fmaxf(maximum, warp_max(fmaxf(a, c)));
    // -inf: nothing finite yet. A NaN must still reach the sum.
    const float reference = above == -INFINITY ? 0.0f : above;
    const float rescale = maximum == -INFINITY ? 1.0f : exp2f(maximum - reference);
    maximum = above;
    const float pa = lane < count ? exp2f(a - reference) : 0.0f;
    const float pc = lane + kLanes < count ? exp2f(c - reference) : 0.0f;
    sum = sum * rescale + warp_sum(pa + pc);
    for (float& o : out) o *= rescale;
    for (int j = 0; j < count; ++j) {
      const float weight = exp2f(logits[j] - reference);
      const PageRow row = p.cache.row(page, j);
      for (int i = 0; i < kDimsPerThread; ++i)
        out[i] = fmaf(weight, *latent_at<float>(row, thread + i * kThreads), out[i]);
    }
    __syncthreads();
  }
  for (int i = 0; i < kDimsPerThread; ++i) {
    const float value = sum == 0 ? 0.0f : out[i] / sum;
    const int d = thread + i * kThreads;
    if (p.out_bf16) {
      p.out.at<BFloat16>(b, s, h)[d] = numeric::bf16_from_float(value);
    } else {
      p.out.at<float>(b, s, h)[d] = value;
    }
  }
  if (p.lse && thread == 0) {
    p.lse[b * p.lse_batch + h * p.lse_head + s * p.lse_token] =
        sum == 0 ? -INFINITY : numeric::kLn2 * (maximum + log2f(sum));
  }
}

}  // namespace

void mla_decode_f32(const MlaDecodeArgs& a, Stream stream) {
  DecodeF32Params p{};
  p.q_latent = rows_view("q_latent", a.q_latent, 16);
  p.q_rope = rows_view("q_rope", a.q_rope, 8);
  p.out = rows_view("out", a.out, 2);
  if (a.lse.raw()) {
    p.lse = a.lse.data<float>();
    p.lse_batch = a.lse.stride(0);
    p.lse_head = a.lse.stride(1);
    p.lse_token = a.lse.stride(2);
  }
  p.cache = cache_params(a.cache);
  p.table = a.block_table.data<std::int32_t>();
  p.lengths = a.cache_seqlens.data<std::int32_t>();
  p.table_stride = a.block_table.stride(0);
  p.heads = static_cast<std::int32_t>(a.q_latent.dim(2));
  p.seqlen_q = static_cast<std::int32_t>(a.q_latent.dim(1));
  p.scale_log2e = a.softmax_scale * numeric::kLog2E;
  p.out_bf16 = a.out.dtype() == DType::kBF16;
  const std::int64_t rows = a.q_latent.dim(0) * a.q_latent.dim(1) * a.q_latent.dim(2);
  launch("mla_decode", Ordering::kStreamOrder, decode_f32_kernel,
         dim3(blocks_for("mla_decode", rows, 1)), dim3(kThreads), 0, stream, p);
}

}  // namespace snapmla::cuda
