// quantize_q and append_kv: one pass, one warp per row, the row in registers (lane.h).
//
//   quantize_q: a row is a (token, head); reads 1152 B of BF16, writes 512 B codes, 128 B rope, 4 B
//   append_kv : a row is a token; reads the same, writes its slot in the page; slot -1 is skipped
//
// Built with -fmad=false: numeric/ decides the bits, and host and device must agree.
// PTXAS: no-spill
#include "backends/cuda/kv_cache/lane.h"
#include "backends/cuda/kv_cache/views.h"
#include "backends/cuda/launch.h"
#include "ops/ops.h"
#include "ops/validate.h"

namespace snapmla::cuda {
namespace {

constexpr int kQueryWarps = 8;   // rows per block: thousands of rows fill the GPU
constexpr int kAppendWarps = 2;  // a decode step appends one token per request: spread them out

struct Rotary {
  const std::int32_t* positions;  // null: no rotation
  const float* cos_sin;
  std::int64_t token_stride[2], table_stride;

  __device__ __forceinline__ void apply(LaneRow& row, std::int64_t i, std::int64_t j,
                                        int lane) const {
    if (!positions) return;
    const std::int64_t position = positions[i * token_stride[0] + j * token_stride[1]];
    rotate_pair(row, cos_sin + position * table_stride + 2 * lane);
  }
};

struct Norm {
  const void* weight;  // null: none
  bool bf16;
  float eps;

  __device__ __forceinline__ void apply(LaneRow& row, int lane) const {
    if (!weight) return;
    double squares = squares_of(row);
    for (int mask = 16; mask > 0; mask /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, mask);
    if (bf16) {
      normalise(row, squares, eps, static_cast<const BFloat16*>(weight), lane);
    } else {
      normalise(row, squares, eps, static_cast<const float*>(weight), lane);
    }
  }
};

struct QuantizeQParams {
  RowsView latent, rope, latent_out, rope_out, scale_out;  // strides in elements
  std::uint32_t rows, heads, seqlen_q;
  ScaleMode mode;
  Rotary rotary;
};

__device__ __forceinline__ Amax warp_amax(const LaneRow& row) {
  Amax a = amax_of(row);
  a.latent = __reduce_max_sync(0xffffffffu, a.latent);
  a.rope = __reduce_max_sync(0xffffffffu, a.rope);
  return a;
}

template <class LatentT, class RopeT>
__global__ void __launch_bounds__(kQueryWarps* kLanes)
    quantize_q_kernel(const __grid_constant__ QuantizeQParams p) {
  const std::uint32_t r = blockIdx.x * kQueryWarps + threadIdx.x / kLanes;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const std::uint32_t token = r / p.heads, h = r % p.heads;
  const std::uint32_t b = token / p.seqlen_q, s = token % p.seqlen_q;
  wait_for_previous();
  if (r >= p.rows) return;
  LaneRow row = load_row(p.latent.at<LatentT>(b, s, h), p.rope.at<RopeT>(b, s, h), lane);
  p.rotary.apply(row, b, s, lane);
  const float scale = scale_of(warp_amax(row), p.mode);
  const numeric::Divider divide(scale);
  auto* codes = p.latent_out.at<std::uint8_t>(b, s, h);
  for (int half = 0; half < 2; ++half) {
    *reinterpret_cast<Bytes8*>(codes + latent_begin(lane, half)) =
        quantize_eight(row.latent + 8 * half, divide);
  }
  *reinterpret_cast<std::uint32_t*>(p.rope_out.at<BFloat16>(b, s, h) + 2 * lane) =
      quantize_rope_pair(row.rope, scale);
  if (lane == 0) *p.scale_out.at<float>(b, s, h) = scale;
}

struct AppendParams {
  RowsView latent, rope;
  const std::int64_t* slots;
  CacheParams cache;
  std::int64_t tokens;
  ScaleMode mode;
  Rotary rotary;
  Norm norm;
};

template <class LatentT, class RopeT, KvCacheFormat kFormat>
__global__ void __launch_bounds__(kAppendWarps* kLanes)
    append_kernel(const __grid_constant__ AppendParams p) {
  const std::int64_t t =
      static_cast<std::int64_t>(blockIdx.x) * kAppendWarps + threadIdx.x / kLanes;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  wait_for_previous();
  if (t >= p.tokens) return;
  const std::int64_t slot = p.slots[t];
  if (slot < 0) return;
  LaneRow row = load_row(p.latent.at<LatentT>(t, 0, 0), p.rope.at<RopeT>(t, 0, 0), lane);
  p.norm.apply(row, lane);
  p.rotary.apply(row, t, 0, lane);
  const PageRow to = p.cache.row(slot / kPageSize, static_cast<int>(slot % kPageSize));
  if constexpr (kFormat == KvCacheFormat::kFp8) {
    store_fp8(to, row, scale_of(warp_amax(row), p.mode), lane);
  } else if constexpr (kFormat == KvCacheFormat::kBf16) {
    store_plain<BFloat16>(to, row, lane);
  } else {
    store_plain<float>(to, row, lane);
  }
}

// positions: one per token, `shape` of them.
Rotary rotary_of(const RotaryFusion& r, std::initializer_list<std::int64_t> shape) {
  Rotary out{};
  if (!r.positions.raw() && !r.cos_sin.raw()) return out;
  ops::check_tensor("positions", r.positions, shape, {DType::kI32});
  ops::check_tensor("cos_sin", r.cos_sin, {ops::kAny, kQkRopeHeadDim}, {DType::kF32});
  rows_view("cos_sin", r.cos_sin, 8);
  out.positions = r.positions.data<std::int32_t>();
  out.cos_sin = r.cos_sin.data<float>();
  out.token_stride[0] = r.positions.stride(0);
  out.token_stride[1] = r.positions.rank() > 1 ? r.positions.stride(1) : 0;
  out.table_stride = r.cos_sin.stride(0);
  return out;
}

Norm norm_of(const NormFusion& n) {
  if (!n.weight.raw()) return {};
  ops::check_tensor("norm weight", n.weight, {kKvLoraRank}, {DType::kF32, DType::kBF16});
  rows_view("norm weight", n.weight, 16);
  require(n.eps > 0, "eps", n.eps, "a number > 0");
  return Norm{n.weight.raw(), n.weight.dtype() == DType::kBF16, n.eps};
}

}  // namespace

void quantize_q(const QuantizeQArgs& a, Stream stream, const RotaryFusion& rotary) {
  ops::check_args(a);
  require_device();
  const std::int64_t rows = a.q_latent.dim(0) * a.q_latent.dim(1) * a.q_latent.dim(2);
  if (rows == 0) return;
  const unsigned blocks = blocks_for("quantize_q", rows, kQueryWarps);
  require(rows <= INT32_MAX, "q_latent rows", rows, "at most 2147483647");
  QuantizeQParams p{rows_view("q_latent", a.q_latent, 16),
                    rows_view("q_rope", a.q_rope, 2 * static_cast<int>(size_of(a.q_rope.dtype()))),
                    rows_view("q_latent_out", a.q_latent_out, 8),
                    rows_view("q_rope_out", a.q_rope_out, 4),
                    rows_view("q_scale_out", a.q_scale_out, 4),
                    static_cast<std::uint32_t>(rows),
                    static_cast<std::uint32_t>(a.q_latent.dim(2)),
                    static_cast<std::uint32_t>(a.q_latent.dim(1)),
                    a.scale_mode,
                    rotary_of(rotary, {a.q_latent.dim(0), a.q_latent.dim(1)})};
  dispatch_float(a.q_latent.dtype(), [&](auto latent) {
    dispatch_float(a.q_rope.dtype(), [&](auto rope) {
      launch("quantize_q", Ordering::kOverlap, quantize_q_kernel<decltype(latent), decltype(rope)>,
             dim3(blocks), dim3(kQueryWarps * kLanes), 0, stream, p);
    });
  });
}

void append_kv(const AppendKvArgs& a, Stream stream, const RotaryFusion& rotary,
               const NormFusion& norm) {
  ops::check_args(a);
  require_device();
  const std::int64_t tokens = a.latent.dim(0);
  if (tokens == 0) return;
  AppendParams p{rows_view("latent", a.latent, 16),
                 rows_view("rope", a.rope, 2 * static_cast<int>(size_of(a.rope.dtype()))),
                 a.slot_mapping.data<const std::int64_t>(),
                 cache_params(a.cache),
                 tokens,
                 a.scale_mode,
                 rotary_of(rotary, {tokens}),
                 norm_of(norm)};
  require(a.slot_mapping.stride(0) == 1 || tokens == 1, "slot_mapping stride",
          a.slot_mapping.stride(0), "1");
  const unsigned blocks = blocks_for("append_kv", tokens, kAppendWarps);
  dispatch_float(a.latent.dtype(), [&](auto latent) {
    dispatch_float(a.rope.dtype(), [&](auto rope) {
      dispatch_format(a.cache.format, [&](auto format) {
        launch("append_kv", Ordering::kOverlap,
               append_kernel<decltype(latent), decltype(rope), decltype(format)::value>,
               dim3(blocks), dim3(kAppendWarps * kLanes), 0, stream, p);
      });
    });
  });
}

}  // namespace snapmla::cuda
