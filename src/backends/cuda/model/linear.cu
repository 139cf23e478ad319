// linear and head_linear: out[t, n] = W[n, :] . x[t, :].
//
//   few tokens : one warp per (token, output), which reads the weight row once
//   many tokens: one warp per 8 tokens x 4 outputs, a block per 32 tokens x 8 outputs: operands
//   come
//                from registers eight and four times, from L1 another two and four times
//
// Both add in the order of dot.h. grid: x = outputs, y = tokens, z = head (head_linear).
// PTXAS: no-spill
#include "backends/cuda/launch.h"
#include "backends/cuda/model/dot.h"
#include "base/check.h"

namespace snapmla::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kFewTokens = 4;

struct LinearParams {
  const float* x;
  float* out;
  DeviceWeight weight;
  std::int64_t x_stride, out_stride;           // elements between tokens
  std::int64_t x_head, out_head, weight_head;  // elements between heads
  std::int64_t tokens, outputs, width;
  bool vector;
};

template <class T>
__device__ __forceinline__ DeviceWeight head_weight(const LinearParams& p) {
  DeviceWeight w = p.weight;
  w.data = static_cast<const T*>(w.data) + blockIdx.z * p.weight_head;
  return w;
}

template <class T>
__global__ void __launch_bounds__(kWarps* kLanes)
    linear_few_kernel(const __grid_constant__ LinearParams p) {
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const std::int64_t t = blockIdx.y;
  if (n >= p.outputs) return;
  const float* x = p.x + blockIdx.z * p.x_head + t * p.x_stride;
  const float sum = dot<T>(head_weight<T>(p), n, x, p.width, p.vector, lane);
  if (lane == 0) p.out[blockIdx.z * p.out_head + t * p.out_stride + n] = sum;
}

constexpr int kTokens = 8, kOutputs = 4;          // of a warp
constexpr int kTokenWarps = 4, kOutputWarps = 2;  // of a block

template <class T>
__global__ void __launch_bounds__(kWarps* kLanes)
    linear_many_kernel(const __grid_constant__ LinearParams p) {
  static_assert(kTokenWarps * kOutputWarps == kWarps && kTokens * kOutputs == kLanes);
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int warp = static_cast<int>(threadIdx.x / kLanes);
  const std::int64_t t0 =
      (static_cast<std::int64_t>(blockIdx.y) * kTokenWarps + warp % kTokenWarps) * kTokens;
  const std::int64_t n0 =
      (static_cast<std::int64_t>(blockIdx.x) * kOutputWarps + warp / kTokenWarps) * kOutputs;
  if (t0 >= p.tokens || n0 >= p.outputs) return;
  const DeviceWeight w = head_weight<T>(p);
  const float* x = p.x + blockIdx.z * p.x_head;
  float sum[kTokens][kOutputs] = {};
  for (std::int64_t k = 4 * lane; k < p.width; k += kDotStep) {
    float b[kOutputs][4];
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      // Rows past the end repeat the last one and are not stored.
      load_weight<T>(w, min(n0 + j, p.outputs - 1), k, p.width, p.vector, b[j]);
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      float a[4];
      load_four(x + min(t0 + i, p.tokens - 1) * p.x_stride, k, p.width, p.vector, a);
#pragma unroll
      for (int j = 0; j < kOutputs; ++j) sum[i][j] = add_products(b[j], a, sum[i][j]);
    }
  }
  float mine = 0;  // lane 4 i + j keeps the result of token i, output j
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      const float total = warp_sum(sum[i][j]);
      if (lane == i * kOutputs + j) mine = total;
    }
  }
  const std::int64_t t = t0 + lane / kOutputs, n = n0 + lane % kOutputs;
  if (t < p.tokens && n < p.outputs) p.out[blockIdx.z * p.out_head + t * p.out_stride + n] = mine;
}

unsigned grid_y(std::int64_t blocks) {
  require(blocks <= 65535, "num_tokens", blocks, "a number that 65535 blocks of 32 tokens hold");
  return static_cast<unsigned>(blocks);
}

void launch_linear(const char* name, const LinearParams& p, DType dtype, std::int64_t heads,
                   Stream stream) {
  const auto z = static_cast<unsigned>(heads);
  dispatch_weight(dtype, [&](auto type) {
    using T = decltype(type);
    if (p.tokens <= kFewTokens) {
      launch(name, Ordering::kStreamOrder, linear_few_kernel<T>,
             dim3(blocks_for(name, p.outputs, kWarps), grid_y(p.tokens), z), dim3(kWarps * kLanes),
             0, stream, p);
    } else {
      const std::int64_t per_block = kTokenWarps * kTokens;
      launch(name, Ordering::kStreamOrder, linear_many_kernel<T>,
             dim3(blocks_for(name, p.outputs, kOutputWarps * kOutputs),
                  grid_y((p.tokens + per_block - 1) / per_block), z),
             dim3(kWarps * kLanes), 0, stream, p);
    }
  });
}

}  // namespace

void linear(const ops::LinearArgs& a, Stream stream) {
  LinearParams p{};
  p.x = a.x.data<float>();
  p.out = a.out.data<float>();
  p.weight = device_weight(a.weight);
  p.x_stride = a.x.stride(0);
  p.out_stride = a.out.stride(0);
  p.tokens = a.x.dim(0);
  p.outputs = a.weight.out_features();
  p.width = a.weight.in_features();
  p.vector = rows_in_fours(a.x) && rows_in_fours(a.weight.data);
  launch_linear("linear", p, a.weight.data.dtype(), 1, stream);
}

void head_linear(const ops::HeadLinearArgs& a, Stream stream) {
  require(a.weight.dim(0) <= 65535, "heads", a.weight.dim(0), "at most 65535");
  LinearParams p{};
  p.x = a.x.data<float>();
  p.out = a.out.data<float>();
  p.weight.data = a.weight.raw();
  p.weight.stride = a.weight.stride(1);
  p.x_stride = a.x.stride(0);
  p.out_stride = a.out.stride(0);
  p.x_head = a.x.stride(1);
  p.out_head = a.out.stride(1);
  p.weight_head = a.weight.stride(0);
  p.tokens = a.x.dim(0);
  p.outputs = a.weight.dim(1);
  p.width = a.weight.dim(2);
  p.vector = rows_in_fours(a.x) && rows_in_fours(a.weight);
  launch_linear("head_linear", p, a.weight.dtype(), a.weight.dim(0), stream);
}

}  // namespace snapmla::cuda
