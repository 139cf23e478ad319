// mla_prefill: naive causal attention of a chunk of queries over all keys so far.
//
//   grid  : x = 32 queries, y = head; block: 8 warps, a warp owns 4 queries
//   shared: one tile of 64 keys and values, the block's queries, the warps' probabilities
//
// Key tiles are anchored at position 0 and visited in order, and a query's arithmetic involves
// nothing of its neighbours: its bits do not depend on the chunk it came in. A lane scores keys
// `lane` and `lane + 32` of a tile and owns value dims lane, lane + 32, ...
// PTXAS: no-spill
#include <algorithm>

#include "backends/cuda/launch.h"
#include "backends/cuda/model/dot.h"
#include "base/check.h"

namespace snapmla::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kWarps = 8;
constexpr int kWarpQueries = 4;
constexpr int kBlockQueries = kWarps * kWarpQueries;

struct PrefillParams {
  const float *q, *k_nope, *k_rope, *v;
  float* out;
  std::int64_t q_token, q_head, nope_token, nope_head, rope_token, v_token, v_head;
  std::int64_t out_token, out_head;  // strides in elements
  std::int64_t queries, begin, keys;
  std::int32_t nope, rope, v_dim;
  float softmax_scale;
};

// Row widths in shared memory: keys odd, so that 32 keys' elements lie in 32 banks; queries in
// fours.
struct SharedShape {
  int key_width, query_width;
  __host__ __device__ explicit SharedShape(int dims)
      : key_width(dims | 1), query_width((dims + 3) / 4 * 4) {}
  __host__ __device__ std::size_t floats(int v_dim) const {
    return static_cast<std::size_t>(kBlockQueries * query_width + kTile * key_width +
                                    kTile * v_dim + kWarps * kWarpQueries * kTile);
  }
};

struct Tile {
  float *queries, *keys, *values, *probabilities;  // queries first: they are read four at a time
};

__device__ __forceinline__ void load_tile(const PrefillParams& p, const Tile& tile,
                                          const SharedShape& shape, std::int64_t first, int count,
                                          std::int64_t head) {
  const int dims = p.nope + p.rope;
  for (int i = static_cast<int>(threadIdx.x); i < count * dims; i += kWarps * kLanes) {
    const int key = i / dims, d = i % dims;
    const std::int64_t t = first + key;
    tile.keys[key * shape.key_width + d] = d < p.nope
                                               ? p.k_nope[t * p.nope_token + head * p.nope_head + d]
                                               : p.k_rope[t * p.rope_token + d - p.nope];
  }
  for (int i = static_cast<int>(threadIdx.x); i < count * p.v_dim; i += kWarps * kLanes) {
    const int key = i / p.v_dim, d = i % p.v_dim;
    tile.values[i] = p.v[(first + key) * p.v_token + head * p.v_head + d];
  }
}

// Products of a warp's queries with keys `lane` and `lane + 32` of the tile.
__device__ __forceinline__ void score(const Tile& tile, const SharedShape& shape, int dims,
                                      int first_query, int lane, float (&s)[kWarpQueries][2]) {
  const float* keys[2] = {tile.keys + lane * shape.key_width,
                          tile.keys + (lane + kLanes) * shape.key_width};
  const float* queries = tile.queries + first_query * shape.query_width;
  for (int i = 0; i < kWarpQueries; ++i) s[i][0] = s[i][1] = 0;
  int d = 0;
  for (; d + 4 <= dims; d += 4) {
    float k[2][4];
    for (int c = 0; c < 4; ++c) {
      k[0][c] = keys[0][d + c];
      k[1][c] = keys[1][d + c];
    }
    for (int i = 0; i < kWarpQueries; ++i) {
      const float4 v = *reinterpret_cast<const float4*>(queries + i * shape.query_width + d);
      const float q[4] = {v.x, v.y, v.z, v.w};
      s[i][0] = add_products(q, k[0], s[i][0]);
      s[i][1] = add_products(q, k[1], s[i][1]);
    }
  }
  for (; d < dims; ++d) {
    for (int i = 0; i < kWarpQueries; ++i) {
      const float q = queries[i * shape.query_width + d];
      s[i][0] = fmaf(q, keys[0][d], s[i][0]);
      s[i][1] = fmaf(q, keys[1][d], s[i][1]);
    }
  }
}

// kDims: value dims per lane.
template <int kDims>
__global__ void __launch_bounds__(kWarps* kLanes)
    prefill_kernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ float4 shared4[];
  const int dims = p.nope + p.rope;
  const SharedShape shape(dims);
  Tile tile;
  tile.queries = reinterpret_cast<float*>(shared4);
  tile.keys = tile.queries + kBlockQueries * shape.query_width;
  tile.values = tile.keys + kTile * shape.key_width;
  tile.probabilities = tile.values + kTile * p.v_dim;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int warp = static_cast<int>(threadIdx.x / kLanes);
  const std::int64_t head = blockIdx.y;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBlockQueries;
  const int count = static_cast<int>(min(p.queries - first, std::int64_t{kBlockQueries}));
  for (int i = static_cast<int>(threadIdx.x); i < kBlockQueries * dims; i += kWarps * kLanes) {
    const int query = i / dims, d = i % dims;
    tile.queries[query * shape.query_width + d] =
        query < count ? p.q[(first + query) * p.q_token + head * p.q_head + d] : 0.0f;
  }

  float out[kWarpQueries][kDims] = {}, maximum[kWarpQueries], sum[kWarpQueries] = {};
  for (int i = 0; i < kWarpQueries; ++i) maximum[i] = -INFINITY;
  const std::int64_t end = p.begin + first + count;  // keys that the block's last query sees
  for (std::int64_t t = 0; t < end; t += kTile) {
    __syncthreads();  // the previous tile is done with
    load_tile(p, tile, shape, t, static_cast<int>(min(end - t, std::int64_t{kTile})), head);
    __syncthreads();
    float s[kWarpQueries][2];
    score(tile, shape, dims, warp * kWarpQueries, lane, s);
    int visible[kWarpQueries];
    float* probabilities = tile.probabilities + warp * kWarpQueries * kTile;
#pragma unroll
    for (int i = 0; i < kWarpQueries; ++i) {
      const int query = warp * kWarpQueries + i;
      const std::int64_t seen = query < count ? p.begin + first + query + 1 - t : 0;
      visible[i] = static_cast<int>(max(std::int64_t{0}, min(seen, std::int64_t{kTile})));
      // Select, never multiply: what lies past the visible keys may be anything.
      const float a = lane < visible[i] ? s[i][0] * p.softmax_scale : -INFINITY;
      const float b = lane + kLanes < visible[i] ? s[i][1] * p.softmax_scale : -INFINITY;
      if (visible[i] == 0) continue;
      const float above = fmaxf(maximum[i], warp_max(fmaxf(a, b)));
      const float rescale = above > maximum[i] ? expf(maximum[i] - above) : 1.0f;
      maximum[i] = above;
      const float pa = lane < visible[i] ? expf(a - above) : 0.0f;
      const float pb = lane + kLanes < visible[i] ? expf(b - above) : 0.0f;
      sum[i] = sum[i] * rescale + warp_sum(pa + pb);
      for (int c = 0; c < kDims; ++c) out[i][c] *= rescale;
      probabilities[i * kTile + lane] = pa;
      probabilities[i * kTile + lane + kLanes] = pb;
    }
    __syncwarp();
    int longest = 0;
    for (int i = 0; i < kWarpQueries; ++i) longest = max(longest, visible[i]);
    for (int j = 0; j < longest; ++j) {
      float value[kDims];
#pragma unroll
      for (int c = 0; c < kDims; ++c) {
        const int d = lane + c * kLanes;
        value[c] = d < p.v_dim ? tile.values[j * p.v_dim + d] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kWarpQueries; ++i) {
        if (j >= visible[i]) continue;
        const float weight = probabilities[i * kTile + j];
        for (int c = 0; c < kDims; ++c) out[i][c] = fmaf(weight, value[c], out[i][c]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kWarpQueries; ++i) {
    const int query = warp * kWarpQueries + i;
    if (query >= count) continue;
    float* to = p.out + (first + query) * p.out_token + head * p.out_head;
#pragma unroll
    for (int c = 0; c < kDims; ++c) {
      const int d = lane + c * kLanes;
      if (d < p.v_dim) to[d] = out[i][c] / sum[i];
    }
  }
}

constexpr std::size_t kMaxSharedBytes = 227 * 1024;

template <int kDims>
void launch_prefill(const PrefillParams& p, std::int64_t heads, std::size_t bytes, Stream stream) {
  check(cudaFuncSetAttribute(prefill_kernel<kDims>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "mla_prefill");
  launch("mla_prefill", Ordering::kStreamOrder, prefill_kernel<kDims>,
         dim3(blocks_for("mla_prefill", p.queries, kBlockQueries), static_cast<unsigned>(heads)),
         dim3(kWarps * kLanes), bytes, stream, p);
}

}  // namespace

void mla_prefill(const ops::MlaPrefillArgs& a, Stream stream) {
  PrefillParams p{};
  p.q = a.q.data<float>();
  p.k_nope = a.k_nope.data<float>();
  p.k_rope = a.k_rope.data<float>();
  p.v = a.v.data<float>();
  p.out = a.out.data<float>();
  p.q_token = a.q.stride(0);
  p.q_head = a.q.stride(1);
  p.nope_token = a.k_nope.stride(0);
  p.nope_head = a.k_nope.stride(1);
  p.rope_token = a.k_rope.stride(0);
  p.v_token = a.v.stride(0);
  p.v_head = a.v.stride(1);
  p.out_token = a.out.stride(0);
  p.out_head = a.out.stride(1);
  p.queries = a.q.dim(0);
  p.begin = a.query_begin;
  p.keys = a.k_nope.dim(0);
  p.nope = static_cast<std::int32_t>(a.k_nope.dim(2));
  p.rope = static_cast<std::int32_t>(a.k_rope.dim(1));
  p.v_dim = static_cast<std::int32_t>(a.v.dim(2));
  p.softmax_scale = a.softmax_scale;
  const std::int64_t heads = a.q.dim(1);
  require(a.v.dim(2) <= 256, "v width", a.v.dim(2), "at most 256 on CUDA");
  require(a.q.dim(2) <= 512, "q width", a.q.dim(2), "at most 512 on CUDA");
  require(heads <= 65535, "heads", heads, "at most 65535");
  const std::size_t bytes = SharedShape(p.nope + p.rope).floats(p.v_dim) * sizeof(float);
  require(bytes <= kMaxSharedBytes, "q and v widths", str(a.q.dim(2), " and ", a.v.dim(2)),
          "widths of which a tile of 64 keys and 32 queries fits 227 KiB");
  if (heads == 0) return;
  if (p.v_dim <= 32) {
    launch_prefill<1>(p, heads, bytes, stream);
  } else if (p.v_dim <= 64) {
    launch_prefill<2>(p, heads, bytes, stream);
  } else if (p.v_dim <= 128) {
    launch_prefill<4>(p, heads, bytes, stream);
  } else {
    launch_prefill<8>(p, heads, bytes, stream);
  }
}

}  // namespace snapmla::cuda
