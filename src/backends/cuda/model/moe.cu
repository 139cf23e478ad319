// Mixture of experts: the router and the routed sum.
//
//   moe_route: one warp per token, scores in shared memory; the rules and the ties of ops/route.h
//   moe_ffn  : hidden[t, k, i] = silu(gate_i . x) * (up_i . x), one warp per element;
//              out[t, d] += sum over k, in order, of weights[t, k] * (down_d . hidden[t, k])
// PTXAS: no-spill
#include <cfloat>

#include "backends/cuda/launch.h"
#include "backends/cuda/model/dot.h"
#include "base/check.h"

namespace snapmla::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxExperts = 2048;  // bounds the shared memory of the router

struct RouteParams {
  const float* logits;
  const float* bias;  // or null
  std::int32_t* ids;
  float* weights;
  std::int64_t logits_stride, ids_stride, weights_stride;
  std::int32_t experts, groups, groups_kept, top_k;
  ops::RouterKind kind;
  bool normalize;
  float scaling_factor;
};

struct Best {
  float value;
  std::int32_t index;
};

// The larger value, then the lower index; an index of -1 is nothing, NaN counts as the smallest.
__device__ __forceinline__ Best better(Best a, Best b) {
  if (b.index < 0) return a;
  if (a.index < 0) return b;
  if (a.value != b.value) return a.value > b.value ? a : b;
  return a.index < b.index ? a : b;
}

// The largest of the first n values whose mark is not set, in every lane; sets its mark.
__device__ std::int32_t take_best(const float* values, std::uint8_t* taken, std::int32_t n,
                                  int lane) {
  Best best{0.0f, -1};
  for (std::int32_t i = lane; i < n; i += kLanes) {
    const float v = values[i];
    if (!taken[i]) best = better(best, Best{v == v ? v : -INFINITY, i});
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    const Best other{__shfl_xor_sync(0xffffffffu, best.value, mask),
                     __shfl_xor_sync(0xffffffffu, best.index, mask)};
    best = better(best, other);
  }
  __syncwarp();
  if (lane == 0) taken[best.index] = 1;
  __syncwarp();
  return best.index;
}

// probability = sigmoid or softmax of the logits; exact to the rounding of the double functions.
__device__ void score_experts(const RouteParams& p, const float* logits, double* terms,
                              float* probability, int lane) {
  if (p.kind == ops::RouterKind::kNoAuxTcSigmoid) {
    for (int e = lane; e < p.experts; e += kLanes)
      probability[e] = static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(logits[e]))));
    __syncwarp();
    return;
  }
  float largest = -INFINITY;
  for (int e = lane; e < p.experts; e += kLanes) largest = fmaxf(largest, logits[e]);
  const double top = warp_max(largest);
  for (int e = lane; e < p.experts; e += kLanes) terms[e] = exp(logits[e] - top);
  __syncwarp();
  double sum = 0;
  for (int e = 0; e < p.experts; ++e) sum += terms[e];
  for (int e = lane; e < p.experts; e += kLanes)
    probability[e] = static_cast<float>(terms[e] / sum);
  __syncwarp();
}

// Experts outside the best groups get the choice score -inf. rank: [groups] scratch.
__device__ void drop_groups(const RouteParams& p, float* choice, float* rank, std::uint8_t* kept,
                            int lane) {
  const int size = p.experts / p.groups;
  const bool two = p.kind == ops::RouterKind::kNoAuxTcSigmoid && size > 1;
  for (int g = lane; g < p.groups; g += kLanes) {
    float first = -INFINITY, second = -INFINITY;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      if (choice[e] > first) {
        second = first;
        first = choice[e];
      } else if (choice[e] > second) {
        second = choice[e];
      }
    }
    rank[g] = two ? first + second : first;
    kept[g] = 0;
  }
  __syncwarp();
  for (int i = 0; i < p.groups_kept; ++i) take_best(rank, kept, p.groups, lane);
  for (int e = lane; e < p.experts; e += kLanes) {
    if (!kept[e / size]) choice[e] = -INFINITY;
  }
  __syncwarp();
}

__global__ void __launch_bounds__(kLanes) route_kernel(const __grid_constant__ RouteParams p) {
  extern __shared__ double shared[];
  double* terms = shared;                                           // [experts]
  auto* probability = reinterpret_cast<float*>(terms + p.experts);  // [experts]
  float* choice = probability + p.experts;                          // [experts]
  float* rank = choice + p.experts;                                 // [experts], groups used
  auto* taken = reinterpret_cast<std::uint8_t*>(rank + p.experts);  // [experts]
  const int lane = static_cast<int>(threadIdx.x);
  const std::int64_t t = blockIdx.x;
  score_experts(p, p.logits + t * p.logits_stride, terms, probability, lane);
  for (int e = lane; e < p.experts; e += kLanes)
    choice[e] = probability[e] + (p.bias ? p.bias[e] : 0.0f);
  __syncwarp();
  if (p.kind != ops::RouterKind::kGreedySoftmax && p.groups > 1)
    drop_groups(p, choice, rank, taken, lane);
  for (int e = lane; e < p.experts; e += kLanes) taken[e] = 0;
  __syncwarp();
  std::int32_t* ids = p.ids + t * p.ids_stride;
  double sum = 1e-20;
  for (int k = 0; k < p.top_k; ++k) {
    const std::int32_t e = take_best(choice, taken, p.experts, lane);
    sum += probability[e];
    if (lane == 0) ids[k] = e;
  }
  __syncwarp();
  for (int k = lane; k < p.top_k; k += kLanes) {
    const double weight = probability[ids[k]] / (p.normalize ? sum : 1.0);
    p.weights[t * p.weights_stride + k] = static_cast<float>(weight * p.scaling_factor);
  }
}

struct ExpertParams {
  const float* x;
  const std::int32_t* ids;
  const float* weights;
  const DeviceExpert* experts;
  float* hidden;  // [tokens, top_k, inner]
  float* out;
  std::int64_t x_stride, ids_stride, weights_stride, out_stride;
  std::int64_t tokens, top_k, width, inner;
  bool vector_width, vector_inner;
};

// Blocks: for every (token, k) the tiles of kWarps inner features.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes)
    gate_up_kernel(const __grid_constant__ ExpertParams p, std::int64_t tiles) {
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const std::int64_t pair = blockIdx.x / tiles;
  const std::int64_t i = blockIdx.x % tiles * kWarps + threadIdx.x / kLanes;
  if (i >= p.inner) return;
  const std::int64_t t = pair / p.top_k, k = pair % p.top_k;
  const DeviceExpert& expert = p.experts[p.ids[t * p.ids_stride + k]];
  const float* x = p.x + t * p.x_stride;
  const float gate = dot<T>(expert.gate, i, x, p.width, p.vector_width, lane);
  const float up = dot<T>(expert.up, i, x, p.width, p.vector_width, lane);
  if (lane == 0) p.hidden[pair * p.inner + i] = gate / (1.0f + expf(-gate)) * up;
}

template <class T>
__global__ void __launch_bounds__(kWarps* kLanes)
    down_kernel(const __grid_constant__ ExpertParams p, std::int64_t tiles) {
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const std::int64_t t = blockIdx.x / tiles;
  const std::int64_t d = blockIdx.x % tiles * kWarps + threadIdx.x / kLanes;
  if (d >= p.width) return;
  float* out = p.out + t * p.out_stride + d;
  float sum = *out;
  for (std::int64_t k = 0; k < p.top_k; ++k) {
    const DeviceExpert& expert = p.experts[p.ids[t * p.ids_stride + k]];
    const float* hidden = p.hidden + (t * p.top_k + k) * p.inner;
    const float value = dot<T>(expert.down, d, hidden, p.inner, p.vector_inner, lane);
    sum = fmaf(p.weights[t * p.weights_stride + k], value, sum);
  }
  if (lane == 0) *out = sum;
}

bool same(const DeviceWeight& a, const DeviceWeight& b) {
  return a.data == b.data && a.scale_inv == b.scale_inv && a.stride == b.stride &&
         a.scale_stride == b.scale_stride;
}

bool same(const std::vector<DeviceExpert>& a, const std::vector<DeviceExpert>& b) {
  bool equal = a.size() == b.size();
  for (std::size_t i = 0; equal && i < a.size(); ++i) {
    equal = same(a[i].gate, b[i].gate) && same(a[i].up, b[i].up) && same(a[i].down, b[i].down);
  }
  return equal;
}

// What the kernels assume of all experts of a layer.
void check_alike(const std::vector<ops::ExpertWeights>& experts, std::int64_t width) {
  const std::int64_t inner = experts.front().gate.out_features();
  const DType type = experts.front().gate.data.dtype();
  for (const ops::ExpertWeights& e : experts) {
    const bool shapes = e.gate.out_features() == inner && e.gate.in_features() == width &&
                        e.up.out_features() == inner && e.up.in_features() == width &&
                        e.down.out_features() == width && e.down.in_features() == inner;
    const bool types =
        e.gate.data.dtype() == type && e.up.data.dtype() == type && e.down.data.dtype() == type;
    require(shapes && types, "experts", "experts of different shapes or types",
            "the shapes and the type of the first expert for all");
  }
}

}  // namespace

void moe_route(const ops::MoeRouteArgs& a, Stream stream) {
  require(a.logits.dim(1) <= kMaxExperts, "experts", a.logits.dim(1), "at most 2048 on CUDA");
  RouteParams p{};
  p.logits = a.logits.data<float>();
  p.bias = a.bias.raw() ? a.bias.data<float>() : nullptr;
  p.ids = a.ids.data<std::int32_t>();
  p.weights = a.weights.data<float>();
  p.logits_stride = a.logits.stride(0);
  p.ids_stride = a.ids.stride(0);
  p.weights_stride = a.weights.stride(0);
  p.experts = static_cast<std::int32_t>(a.logits.dim(1));
  p.groups = a.num_groups;
  p.groups_kept = a.groups_kept;
  p.top_k = a.top_k;
  p.kind = a.kind;
  p.normalize = a.normalize;
  p.scaling_factor = a.scaling_factor;
  const std::size_t bytes = static_cast<std::size_t>(p.experts) * (8 + 4 + 4 + 4 + 1);
  launch("moe_route", Ordering::kStreamOrder, route_kernel,
         dim3(blocks_for("moe_route", a.logits.dim(0), 1)), dim3(kLanes), bytes, stream, p);
}

void ExpertRunner::run(const ops::MoeFfnArgs& a, Memory& memory, Stream stream) {
  check_alike(*a.experts, a.x.dim(1));
  std::vector<DeviceExpert> wanted;
  bool vector_width = rows_in_fours(a.x), vector_inner = true;
  for (const ops::ExpertWeights& e : *a.experts) {
    wanted.push_back({device_weight(e.gate), device_weight(e.up), device_weight(e.down)});
    vector_width = vector_width && rows_in_fours(e.gate.data) && rows_in_fours(e.up.data);
    vector_inner = vector_inner && rows_in_fours(e.down.data);
  }
  Table& table = tables_[a.experts];
  if (!same(table.host, wanted)) {
    const auto bytes = static_cast<std::int64_t>(wanted.size() * sizeof(DeviceExpert));
    table.device.grow(memory, bytes);
    memory.upload(table.device.data(), wanted.data(), bytes);
    table.host = wanted;
  }
  ExpertParams p{};
  p.x = a.x.data<float>();
  p.ids = a.ids.data<std::int32_t>();
  p.weights = a.weights.data<float>();
  p.experts = static_cast<const DeviceExpert*>(table.device.data());
  p.out = a.out.data<float>();
  p.x_stride = a.x.stride(0);
  p.ids_stride = a.ids.stride(0);
  p.weights_stride = a.weights.stride(0);
  p.out_stride = a.out.stride(0);
  p.tokens = a.x.dim(0);
  p.top_k = a.ids.dim(1);
  p.width = a.x.dim(1);
  p.inner = a.experts->front().gate.out_features();
  p.vector_width = vector_width;
  p.vector_inner = vector_inner;
  hidden_.grow(memory, p.tokens * p.top_k * p.inner * static_cast<std::int64_t>(sizeof(float)));
  p.hidden = static_cast<float*>(hidden_.data());
  if (p.tokens * p.top_k == 0) return;
  const std::int64_t inner_tiles = (p.inner + kWarps - 1) / kWarps;
  const std::int64_t width_tiles = (p.width + kWarps - 1) / kWarps;
  dispatch_weight(a.experts->front().gate.data.dtype(), [&](auto type) {
    using T = decltype(type);
    launch("moe_ffn", Ordering::kStreamOrder, gate_up_kernel<T>,
           dim3(blocks_for("moe_ffn", p.tokens * p.top_k * inner_tiles, 1)), dim3(kWarps * kLanes),
           0, stream, p, inner_tiles);
    launch("moe_ffn", Ordering::kStreamOrder, down_kernel<T>,
           dim3(blocks_for("moe_ffn", p.tokens * width_tiles, 1)), dim3(kWarps * kLanes), 0, stream,
           p, width_tiles);
  });
}

}  // namespace snapmla::cuda
