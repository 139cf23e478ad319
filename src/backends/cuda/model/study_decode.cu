// study_decode (ops/study.h): decode over an F32 cache of values with scales beside them, with P as
// numeric/softmax.h has it and sums as numeric/tensor_core.h models them. One block per (request,
// token, head), blocks of 64 or 128 keys in order.
#include "backends/cuda/kv_cache/views.h"
#include "backends/cuda/launch.h"
#include "backends/cuda/model/dot.h"
#include "backends/cuda/study.h"
#include "numeric/softmax.h"
#include "numeric/tensor_core.h"

namespace snapmla::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kMaxBlock = 128;
constexpr int kDims = kKvLoraRank / kThreads;  // per thread
constexpr int kGroup = numeric::kTensorCoreGroup;
static_assert(kMaxBlock % kGroup == 0 && kDims == 2);

struct StudyDecodeParams {
  RowsView q_latent, q_rope, out;  // strides in elements
  const float* q_scale;            // or null; strides below
  std::int64_t scale_batch, scale_token, scale_head;
  CacheParams cache;
  const std::int32_t *table, *lengths;
  std::int64_t table_stride;
  std::int32_t heads, seqlen_q, p_block;
  float scale_log2e;
  bool quantise_p;
  ops::Accumulation accumulation;
};

__device__ __forceinline__ LaneRow load_query(const Float8E4M3* latent, const BFloat16* rope,
                                              int lane) {
  LaneRow row;
  for (int i = 0; i < 16; ++i)
    row.latent[i] = numeric::e4m3_to_float(latent[latent_begin(lane, i / 8) + i % 8]);
  load_two(rope + 2 * lane, row.rope);
  return row;
}
__device__ __forceinline__ LaneRow load_query(const float* latent, const float* rope, int lane) {
  return load_row(latent, rope, lane);
}

// q . (k / s) of one token, in every lane.
__device__ __forceinline__ float score(const LaneRow& q, const LaneRow& k, float s) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum = fmaf(q.latent[i], numeric::snap_to_e4m3(k.latent[i] / s), sum);
  sum = fmaf(q.rope[0], k.rope[0] / s, sum);
  sum = fmaf(q.rope[1], k.rope[1] / s, sum);
  return warp_sum(sum);
}

// numeric::tensor_core_add of a whole group, operands as they are.
__device__ __forceinline__ float tensor_core_add(float accumulator, const float* p,
                                                 const float* codes) {
  float largest = fabsf(accumulator);
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    largest = fmaxf(largest, numeric::e4m3_power(p[i]) * numeric::e4m3_power(codes[i]));
  const numeric::TensorCoreStep s = numeric::tensor_core_step(largest);
  float sum = truncf(accumulator * s.inverse);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sum += truncf(p[i] * codes[i] * s.inverse);  // exact
  return numeric::tensor_core_cut(sum * s.step);
}

template <class LatentT, class RopeT>
__global__ void __launch_bounds__(kThreads)
    study_decode_kernel(const __grid_constant__ StudyDecodeParams p) {
  __shared__ float logits[kMaxBlock], weights[kMaxBlock], scales[kMaxBlock];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes, warp = thread / kLanes;
  const std::int64_t h = blockIdx.x % p.heads, token = blockIdx.x / p.heads;
  const std::int64_t s = token % p.seqlen_q, b = token / p.seqlen_q;
  const std::int64_t visible = static_cast<std::int64_t>(p.lengths[b]) - p.seqlen_q + s + 1;
  const LaneRow q = load_query(p.q_latent.at<LatentT>(b, s, h), p.q_rope.at<RopeT>(b, s, h), lane);
  const float q_scale =
      p.q_scale ? p.q_scale[b * p.scale_batch + s * p.scale_token + h * p.scale_head] : 1.0f;
  const float factor = q_scale * p.scale_log2e;
  const bool one_level = p.accumulation == ops::Accumulation::kOneLevel ||
                         p.accumulation == ops::Accumulation::kTensorCoreOneLevel;
  const bool cut = p.accumulation == ops::Accumulation::kTensorCore ||
                   p.accumulation == ops::Accumulation::kTensorCoreOneLevel;

  numeric::RowState state;  // the same in every thread
  float out[kDims] = {};
  for (std::int64_t t = 0; t < visible; t += p.p_block) {
    const int count = static_cast<int>(min(visible - t, static_cast<std::int64_t>(p.p_block)));
    const std::int32_t* table = p.table + b * p.table_stride + t / kPageSize;
    for (int j = warp; j < count; j += kWarps) {
      const PageRow row = p.cache.row(table[j / kPageSize], j % kPageSize);
      const float scale = row.scale[row.token];
      const float x = score(q, load_f32(row, lane), scale) * scale * factor;
      if (lane == 0) {
        logits[j] = x + numeric::log2_scale(scale);
        scales[j] = scale;
      }
    }
    __syncthreads();
    // Every warp looks at all logits of the block: the same numbers in the same order.
    float m = -INFINITY;
    bool nan = false;
    for (int j = lane; j < count; j += kLanes) {
      nan = nan || numeric::is_nan(logits[j]);
      m = fmaxf(m, logits[j]);  // drops NaN
    }
    m = warp_max(m);
    nan = __any_sync(0xffffffffu, nan) != 0;
    const numeric::BlockFactors f = numeric::begin_block(state, m, nan);
    if (!f.skip) {
      float sum = 0;
      for (int j = lane; j < count; j += kLanes) {
        const float weight = p.quantise_p
                                 ? numeric::e4m3_to_float(numeric::quantize_p(logits[j], f.maximum))
                                 : numeric::kE4M3Max * exp2f(logits[j] - f.maximum);
        sum += weight / scales[j];
        if (warp == 0) weights[j] = weight;
      }
      state.sum += f.sigma * warp_sum(sum);
    }
    __syncthreads();
    for (int i = 0; !f.skip && i < kDims; ++i) {
      const int d = thread + i * kThreads;
      out[i] *= f.rescale;
      float sum = !one_level || f.sigma == 0.0f ? 0.0f : out[i] / f.sigma;
      // A sum that leaves f32 in this block's units cuts every product off whole.
      const bool faded = fabsf(sum) > 0x1p100f;
      float weight[kGroup], code[kGroup];
      for (int first = 0; first < count && !faded; first += kGroup) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const int k = first + j;
          weight[j] = code[j] = 0.0f;
          if (k < count) {
            const PageRow row = p.cache.row(table[k / kPageSize], k % kPageSize);
            weight[j] = weights[k];
            code[j] = numeric::snap_to_e4m3(*latent_at<float>(row, d) / scales[k]);
          }
        }
        if (cut) {
          sum = tensor_core_add(sum, weight, code);
        } else {
#pragma unroll
          for (int j = 0; j < kGroup; ++j) sum += weight[j] * code[j];
        }
      }
      if (!one_level) {
        out[i] += f.sigma * sum;
      } else if (!faded && f.sigma != 0.0f) {
        out[i] = f.sigma * sum;
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < kDims; ++i) {
    p.out.at<float>(b, s, h)[thread + i * kThreads] = state.sum == 0 ? 0.0f : out[i] / state.sum;
  }
}

}  // namespace

void study_decode(const ops::StudyDecodeArgs& args, Stream stream) {
  const MlaDecodeArgs& a = args.decode;
  const bool codes = a.q_latent.dtype() == DType::kE4M3;
  StudyDecodeParams p{};
  p.q_latent = rows_view("q_latent", a.q_latent, 16);
  p.q_rope = rows_view("q_rope", a.q_rope, codes ? 4 : 8);
  p.out = rows_view("out", a.out, 4);
  if (a.q_scale.raw()) {
    p.q_scale = a.q_scale.data<float>();
    p.scale_batch = a.q_scale.stride(0);
    p.scale_token = a.q_scale.stride(1);
    p.scale_head = a.q_scale.stride(2);
  }
  p.cache = cache_params(a.cache);
  p.table = a.block_table.data<std::int32_t>();
  p.lengths = a.cache_seqlens.data<std::int32_t>();
  p.table_stride = a.block_table.stride(0);
  p.heads = static_cast<std::int32_t>(a.q_latent.dim(2));
  p.seqlen_q = static_cast<std::int32_t>(a.q_latent.dim(1));
  p.p_block = args.numerics.p_block;
  p.scale_log2e = a.softmax_scale * numeric::kLog2E;
  p.quantise_p = args.numerics.quantise_p;
  p.accumulation = args.numerics.accumulation;
  const std::int64_t rows = a.q_latent.dim(0) * a.q_latent.dim(1) * a.q_latent.dim(2);
  if (rows == 0) return;
  const auto run = [&](auto kernel) {
    launch("study_decode", Ordering::kStreamOrder, kernel,
           dim3(blocks_for("study_decode", rows, 1)), dim3(kThreads), 0, stream, p);
  };
  if (codes) {
    run(study_decode_kernel<Float8E4M3, BFloat16>);
  } else {
    run(study_decode_kernel<float, float>);
  }
}

}  // namespace snapmla::cuda
