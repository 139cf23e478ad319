// embed, rms_norm, rope, swiglu, copy_rows, add.
//
// Built with -fmad=false, so that embed, rope, copy_rows and add give the bits of the cpu backend.
// PTXAS: no-spill
#include "backends/cuda/kv_cache/views.h"
#include "backends/cuda/launch.h"
#include "backends/cuda/model/dot.h"
#include "base/check.h"

namespace snapmla::cuda {
namespace {

constexpr int kThreads = 256;

// A matrix of rows; stride in elements.
template <class T>
struct Rows {
  T* data;
  std::int64_t stride;
  __device__ __forceinline__ T* row(std::int64_t i) const { return data + i * stride; }
};

template <class T = float>
Rows<T> rows_of(const TensorView& t) {
  return {t.data<T>(), t.stride(0)};
}

__device__ __forceinline__ float as_float(float v) { return v; }
__device__ __forceinline__ float as_float(BFloat16 v) { return numeric::bf16_to_float(v); }
__device__ __forceinline__ void put(float& to, float v) { to = v; }
__device__ __forceinline__ void put(BFloat16& to, float v) { to = numeric::bf16_from_float(v); }

// One thread per element: calls fn(row, column).
template <class Fn>
__global__ void __launch_bounds__(kThreads)
    each_kernel(std::int64_t count, std::uint32_t width, Fn fn) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) fn(i / width, i % width);
}

template <class Fn>
void for_each(const char* name, const TensorView& t, Stream stream, Fn fn) {
  const std::int64_t count = t.dim(0) * t.dim(1);
  if (count == 0) return;
  require(t.dim(1) <= INT32_MAX, "width", t.dim(1), "at most 2147483647");
  launch(name, Ordering::kStreamOrder, each_kernel<Fn>, dim3(blocks_for(name, count, kThreads)),
         dim3(kThreads), 0, stream, count, static_cast<std::uint32_t>(t.dim(1)), fn);
}

template <class T>
struct Embed {
  Rows<T> table;
  const std::int32_t* ids;
  Rows<float> out;
  __device__ void operator()(std::int64_t t, std::int64_t d) const {
    out.row(t)[d] = as_float(table.row(ids[t])[d]);
  }
};

struct Swiglu {
  Rows<float> gate, up, out;
  __device__ void operator()(std::int64_t t, std::int64_t d) const {
    const float g = gate.row(t)[d];
    out.row(t)[d] = g / (1.0f + expf(-g)) * up.row(t)[d];
  }
};

template <class T>
struct CopyRows {
  Rows<float> x;
  Rows<T> out;
  __device__ void operator()(std::int64_t t, std::int64_t d) const {
    put(out.row(t)[d], x.row(t)[d]);
  }
};

struct Add {
  Rows<float> x, y;
  __device__ void operator()(std::int64_t t, std::int64_t d) const { y.row(t)[d] += x.row(t)[d]; }
};

// One block per row; squares are summed in double, thread by thread and then in a tree.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(Rows<float> x, const T* weight, Rows<float> out, std::int64_t width,
                    float eps) {
  __shared__ double partial[kThreads];
  const float* from = x.row(blockIdx.x);
  float* to = out.row(blockIdx.x);
  double squares = 0;
  for (std::int64_t d = threadIdx.x; d < width; d += kThreads)
    squares += static_cast<double>(from[d]) * from[d];
  partial[threadIdx.x] = squares;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  __syncthreads();
  const auto inverse =
      static_cast<float>(1.0 / sqrt(partial[0] / static_cast<double>(width) + eps));
  // out may be x: every thread writes only what it alone reads.
  for (std::int64_t d = threadIdx.x; d < width; d += kThreads)
    to[d] = as_float(weight[d]) * (from[d] * inverse);
}

constexpr int kRopeWarps = 8;
constexpr int kMaxPairs = 8;  // per lane: widths up to 512

struct RopeParams {
  float* x;
  const std::int32_t* positions;
  Rows<float> table;
  std::int64_t token_stride, head_stride, rows;
  std::int32_t heads, half;
  bool interleaved, to_interleaved;
};

// One warp per (token, head). All pairs are read before any is written: the results may go to other
// places of the row.
__global__ void __launch_bounds__(kRopeWarps* kLanes)
    rope_kernel(const __grid_constant__ RopeParams p) {
  const std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * kRopeWarps + threadIdx.x / kLanes;
  if (r >= p.rows) return;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const std::int64_t t = r / p.heads, h = r % p.heads;
  const float* table = p.table.row(p.positions[t]);
  float* x = p.x + t * p.token_stride + h * p.head_stride;
  float first[kMaxPairs], second[kMaxPairs];
#pragma unroll
  for (int i = 0; i < kMaxPairs; ++i) {
    const int j = lane + i * kLanes;
    if (j >= p.half) continue;
    const float a = p.interleaved ? x[2 * j] : x[j];
    const float b = p.interleaved ? x[2 * j + 1] : x[j + p.half];
    const float c = table[2 * j], s = table[2 * j + 1];
    first[i] = a * c - b * s;
    second[i] = a * s + b * c;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kMaxPairs; ++i) {
    const int j = lane + i * kLanes;
    if (j >= p.half) continue;
    const bool pairs = p.interleaved || p.to_interleaved;
    x[pairs ? 2 * j : j] = first[i];
    x[pairs ? 2 * j + 1 : j + p.half] = second[i];
  }
}

}  // namespace

void embed(const ops::EmbedArgs& a, Stream stream) {
  dispatch_float(a.table.dtype(), [&](auto type) {
    using T = decltype(type);
    for_each("embed", a.out, stream,
             Embed<T>{rows_of<T>(a.table), a.ids.data<std::int32_t>(), rows_of(a.out)});
  });
}

void swiglu(const ops::SwigluArgs& a, Stream stream) {
  for_each("swiglu", a.out, stream, Swiglu{rows_of(a.gate), rows_of(a.up), rows_of(a.out)});
}

void copy_rows(const ops::CopyRowsArgs& a, Stream stream) {
  dispatch_float(a.out.dtype(), [&](auto type) {
    using T = decltype(type);
    for_each("copy_rows", a.out, stream, CopyRows<T>{rows_of(a.x), rows_of<T>(a.out)});
  });
}

void add(const TensorView& x, const TensorView& y, Stream stream) {
  for_each("add", y, stream, Add{rows_of(x), rows_of(y)});
}

void rms_norm(const ops::RmsNormArgs& a, Stream stream) {
  dispatch_float(a.weight.dtype(), [&](auto type) {
    using T = decltype(type);
    launch("rms_norm", Ordering::kStreamOrder, rms_norm_kernel<T>,
           dim3(blocks_for("rms_norm", a.x.dim(0), 1)), dim3(kThreads), 0, stream, rows_of(a.x),
           static_cast<const T*>(a.weight.data<T>()), rows_of(a.out), a.x.dim(1), a.eps);
  });
}

void rope(const ops::RopeArgs& a, Stream stream) {
  require(a.x.dim(2) <= 2 * kMaxPairs * kLanes, "x width", a.x.dim(2), "at most 512 on CUDA");
  RopeParams p{};
  p.x = a.x.data<float>();
  p.positions = a.positions.data<std::int32_t>();
  p.table = rows_of(a.cos_sin);
  p.token_stride = a.x.stride(0);
  p.head_stride = a.x.stride(1);
  p.rows = a.x.dim(0) * a.x.dim(1);
  p.heads = static_cast<std::int32_t>(a.x.dim(1));
  p.half = static_cast<std::int32_t>(a.x.dim(2) / 2);
  p.interleaved = a.interleaved;
  p.to_interleaved = a.to_interleaved;
  if (p.rows == 0) return;
  launch("rope", Ordering::kStreamOrder, rope_kernel, dim3(blocks_for("rope", p.rows, kRopeWarps)),
         dim3(kRopeWarps * kLanes), 0, stream, p);
}

}  // namespace snapmla::cuda
