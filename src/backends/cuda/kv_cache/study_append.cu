// study_append (ops/study.h): storing tokens by another rule, one warp per token.
//
// Built with -fmad=false: numeric/store_rule.h decides the bits, and host and device must agree.
// PTXAS: no-spill
#include "backends/cuda/kv_cache/lane.h"
#include "backends/cuda/kv_cache/views.h"
#include "backends/cuda/launch.h"
#include "backends/cuda/study.h"

namespace snapmla::cuda {
namespace {

constexpr int kWarps = 2;
constexpr int kThreads = 256;

struct StudyParams {
  RowsView latent, rope;  // f32, strides in elements
  const std::int64_t* slots;
  CacheParams cache;
  std::int64_t tokens;
  numeric::StoreRule rule;
};

// The largest magnitude of a lane's eight elements, over the 16 lanes that hold the same tile.
__device__ __forceinline__ std::uint32_t tile_amax(const float* v) {
  std::uint32_t m = 0;
  for (int i = 0; i < 8; ++i) m = max(m, magnitude(v[i]));
  for (int mask = 8; mask > 0; mask /= 2) m = max(m, __shfl_xor_sync(0xffffffffu, m, mask));
  return m;
}

template <bool kFp8>
__global__ void __launch_bounds__(kWarps* kLanes)
    study_append_kernel(const __grid_constant__ StudyParams p) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  if (t >= p.tokens) return;
  const std::int64_t slot = p.slots[t];
  if (slot < 0) return;
  LaneRow row = load_row(p.latent.at<float>(t, 0, 0), p.rope.at<float>(t, 0, 0), lane);
  // Half 0 of a row is tiles 0 (lanes 0 to 15) and 1, half 1 tiles 2 and 3.
  const std::uint32_t tile[2] = {tile_amax(row.latent), tile_amax(row.latent + 8)};
  Amax amax;
  amax.latent = __reduce_max_sync(0xffffffffu, max(tile[0], tile[1]));
  amax.rope = __reduce_max_sync(0xffffffffu, max(magnitude(row.rope[0]), magnitude(row.rope[1])));
  const std::uint32_t infinity = 0x7f800000u;
  const float scale =
      numeric::rule_scale(p.rule, numeric::float_of(amax.latent), numeric::float_of(amax.rope),
                          amax.latent < infinity && amax.rope < infinity);
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 8; ++i) {
      float& v = row.latent[8 * half + i];
      v = numeric::rule_latent(p.rule, v, latent_begin(lane, half) + i, scale,
                               numeric::float_of(tile[half]));
    }
  }
  for (float& v : row.rope) v = numeric::rule_rope(p.rule, v, scale);
  const int token = static_cast<int>(slot % kPageSize);
  const PageRow to = p.cache.row(slot / kPageSize, token);
  if constexpr (kFp8) {
    // The codes are values of their formats already: packing rounds nothing.
    for (int half = 0; half < 2; ++half) {
      const float* v = row.latent + 8 * half;
      *reinterpret_cast<Bytes8*>(latent_at<Float8E4M3>(to, latent_begin(lane, half))) = Bytes8{
          {numeric::pack_e4m3(v[0], v[1], v[2], v[3]), numeric::pack_e4m3(v[4], v[5], v[6], v[7])}};
    }
    *reinterpret_cast<Word*>(rope_at<BFloat16>(to, 2 * lane)) =
        numeric::pack_bf16(row.rope[0], row.rope[1]);
  } else {
    for (float& v : row.latent) v *= scale;
    for (float& v : row.rope) v *= scale;
    store_plain<float>(to, row, lane);
  }
  if (lane == 0) to.scale[token] = numeric::rule_written_scale(p.rule, scale, token);
}

// One thread per token; the one at the odd slot of a pair exchanges both scales.
__global__ void __launch_bounds__(kThreads)
    study_exchange_kernel(const __grid_constant__ StudyParams p) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= p.tokens) return;
  const std::int64_t slot = p.slots[t];
  const int token = static_cast<int>(slot % kPageSize);
  if (slot < 0 || token % 2 == 0 || !numeric::has_fault(p.rule, token)) return;
  float* scale = p.cache.row(slot / kPageSize, token).scale + token;
  const float mine = scale[0];
  scale[0] = scale[-1];
  scale[-1] = mine;
}

}  // namespace

void study_append(const ops::StudyAppendArgs& a, Stream stream) {
  const std::int64_t tokens = a.latent.dim(0);
  if (tokens == 0) return;
  const StudyParams p{rows_view("latent", a.latent, 16),
                      rows_view("rope", a.rope, 8),
                      a.slot_mapping.data<const std::int64_t>(),
                      cache_params(a.cache),
                      tokens,
                      a.rule};
  const dim3 grid(blocks_for("study_append", tokens, kWarps)), block(kWarps * kLanes);
  const auto run = [&](auto kernel) {
    launch("study_append", Ordering::kStreamOrder, kernel, grid, block, 0, stream, p);
  };
  if (a.cache.format == KvCacheFormat::kFp8) {
    run(study_append_kernel<true>);
  } else {
    run(study_append_kernel<false>);
  }
  if (a.rule.fault == numeric::StoreFault::kNeighbour) {
    launch("study_append", Ordering::kStreamOrder, study_exchange_kernel,
           dim3(blocks_for("study_append", tokens, kThreads)), dim3(kThreads), 0, stream, p);
  }
}

}  // namespace snapmla::cuda
