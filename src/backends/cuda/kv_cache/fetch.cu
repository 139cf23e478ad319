// fetch_dequant: one warp per token of a token range, latent * scale and rope * scale.
//
// Built with -fmad=false: numeric/ decides the bits, and host and device must agree.
// PTXAS: no-spill
#include "backends/cuda/kv_cache/lane.h"
#include "backends/cuda/kv_cache/views.h"
#include "backends/cuda/launch.h"
#include "ops/ops.h"

namespace snapmla::cuda {
namespace {

constexpr int kFetchWarps = 4;

struct FetchParams {
  CacheParams cache;
  const std::int32_t* table;
  std::int64_t begin, end;
  RowsView latent, rope;
};

template <class LatentT, class RopeT, KvCacheFormat kFormat>
__global__ void __launch_bounds__(kFetchWarps* kLanes)
    fetch_kernel(const __grid_constant__ FetchParams p) {
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * kFetchWarps + threadIdx.x / kLanes;
  const std::int64_t t = p.begin + row;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  wait_for_previous();
  if (t >= p.end) return;
  const PageRow from = p.cache.row(p.table[t / kPageSize], static_cast<int>(t % kPageSize));
  LaneRow values;
  if constexpr (kFormat == KvCacheFormat::kFp8) {
    values = load_fp8(from, lane);
  } else if constexpr (kFormat == KvCacheFormat::kBf16) {
    values = load_bf16(from, lane);
  } else {
    values = load_f32(from, lane);
  }
  store_row(p.latent.at<LatentT>(row, 0, 0), p.rope.at<RopeT>(row, 0, 0), values, lane);
}

}  // namespace

void fetch_dequant(const FetchDequantArgs& a, Stream stream) {
  ops::check_args(a);
  require_device();
  const std::int64_t tokens = a.token_end - a.token_begin;
  if (tokens == 0) return;
  require(a.block_table.stride(0) == 1 || a.block_table.dim(0) == 1, "block_table stride",
          a.block_table.stride(0), "1");
  const FetchParams p{
      cache_params(a.cache),
      a.block_table.data<const std::int32_t>(),
      a.token_begin,
      a.token_end,
      rows_view("latent_out", a.latent_out, 16),
      rows_view("rope_out", a.rope_out, 2 * static_cast<int>(size_of(a.rope_out.dtype())))};
  const unsigned blocks = blocks_for("fetch_dequant", tokens, kFetchWarps);
  dispatch_float(a.latent_out.dtype(), [&](auto latent) {
    dispatch_float(a.rope_out.dtype(), [&](auto rope) {
      dispatch_format(a.cache.format, [&](auto format) {
        launch("fetch_dequant", Ordering::kOverlap,
               fetch_kernel<decltype(latent), decltype(rope), decltype(format)::value>,
               dim3(blocks), dim3(kFetchWarps * kLanes), 0, stream, p);
      });
    });
  });
}

}  // namespace snapmla::cuda
