// What an engine author does on a Hopper GPU: raw device pointers and a stream, one workspace, a
// plan per step, decode in a CUDA graph that follows lengths which change between replays. Three
// requests, 16 query heads; every answer is compared with exact attention over the values before
// they were quantised. Exit code 77 where there is no Hopper GPU.
#include <cuda_runtime.h>
#include <snapmla/cuda.h>
#include <snapmla/error.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <vector>

using namespace snapmla;

namespace {

constexpr std::int64_t kBatch = 3, kHeads = 16, kMaxPages = 8, kMaxTokens = kMaxPages * kPageSize;
const float kScale = 1.0f / std::sqrt(128.0f + 64.0f);  // (nope + rope)^-0.5

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

template <class T>
class Device {
 public:
  explicit Device(std::int64_t n) : size_(static_cast<std::size_t>(n)) {
    check(cudaMalloc(&data_, size_ * sizeof(T)));
  }
  explicit Device(const std::vector<T>& values) : Device(static_cast<std::int64_t>(values.size())) {
    set(values);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(data_); }
  T* get() const { return data_; }
  void set(const std::vector<T>& values) {
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> values() const {
    std::vector<T> copy(size_);
    check(cudaMemcpy(copy.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return copy;
  }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

std::vector<float> normal(std::int64_t n, std::uint32_t seed) {
  std::mt19937 bits(seed);
  std::normal_distribution<float> draw;
  std::vector<float> x(static_cast<std::size_t>(n));
  for (float& value : x) value = draw(bits);
  return x;
}

// Largest relative error of the heads of one request against softmax attention in double.
double worst_error(const float* q, const float* q_rope, const float* latent, const float* rope,
                   std::int64_t tokens, const float* out) {
  double worst = 0;
  for (std::int64_t h = 0; h < kHeads; ++h) {
    std::vector<double> score(static_cast<std::size_t>(tokens)), want(kKvLoraRank);
    double top = -INFINITY, sum = 0, error = 0, norm = 0;
    for (std::int64_t t = 0; t < tokens; ++t) {
      double s = 0;
      for (int d = 0; d < kKvLoraRank; ++d)
        s += double{q[h * kKvLoraRank + d]} * latent[t * kKvLoraRank + d];
      for (int d = 0; d < kQkRopeHeadDim; ++d)
        s += double{q_rope[h * kQkRopeHeadDim + d]} * rope[t * kQkRopeHeadDim + d];
      score[static_cast<std::size_t>(t)] = kScale * s;
      top = std::max(top, kScale * s);
    }
    for (double& s : score) sum += s = std::exp(s - top);
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (int d = 0; d < kKvLoraRank; ++d)
        want[static_cast<std::size_t>(d)] +=
            score[static_cast<std::size_t>(t)] / sum * latent[t * kKvLoraRank + d];
    }
    for (int d = 0; d < kKvLoraRank; ++d) {
      const double x = want[static_cast<std::size_t>(d)];
      error += (out[h * kKvLoraRank + d] - x) * (out[h * kKvLoraRank + d] - x);
      norm += x * x;
    }
    worst = std::max(worst, std::sqrt(error / norm));
  }
  return worst;
}

int run() {
  // A pool of pages on the device; request b owns pages b * kMaxPages onwards.
  const std::int64_t tokens = kBatch * kMaxTokens, pages = kBatch * kMaxPages;
  Device<std::uint8_t> pool(pages * page_layout(KvCacheFormat::kFp8).page_bytes);
  const auto cache = KvCacheView::of_pool(pool.get(), pages, KvCacheFormat::kFp8);
  const std::vector<float> latent = normal(tokens * kKvLoraRank, 1);
  const std::vector<float> rope = normal(tokens * kQkRopeHeadDim, 2);
  std::vector<std::int64_t> slots(static_cast<std::size_t>(tokens));
  std::vector<std::int32_t> table(static_cast<std::size_t>(pages));
  for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int64_t>(i);
  for (std::size_t i = 0; i < table.size(); ++i) table[i] = static_cast<std::int32_t>(i);
  const Device<float> d_latent(latent), d_rope(rope);
  const Device<std::int64_t> d_slots(slots);
  const Device<std::int32_t> d_table(table);

  const std::vector<float> q = normal(kBatch * kHeads * kKvLoraRank, 3);
  const std::vector<float> q_rope = normal(kBatch * kHeads * kQkRopeHeadDim, 4);
  const Device<float> d_q(q), d_q_rope(q_rope);
  Device<Float8E4M3> q_codes(kBatch * kHeads * kKvLoraRank);
  Device<BFloat16> q_rope_scaled(kBatch * kHeads * kQkRopeHeadDim);
  Device<float> q_scale(kBatch * kHeads), out(kBatch * kHeads * kKvLoraRank);
  Device<std::int32_t> lengths(kBatch);

  const cuda::DecodeShape shape{.batch = kBatch, .heads_q = kHeads, .max_pages = kMaxPages};
  const std::int64_t bytes = cuda::decode_workspace_bytes(shape);
  Device<std::uint8_t> memory(bytes);
  const cuda::Workspace workspace{memory.get(), bytes};
  const MlaDecodeArgs decode{
      .q_latent = TensorView::of(q_codes.get(), {kBatch, 1, kHeads, kKvLoraRank}),
      .q_rope = TensorView::of(q_rope_scaled.get(), {kBatch, 1, kHeads, kQkRopeHeadDim}),
      .q_scale = TensorView::of(q_scale.get(), {kBatch, 1, kHeads}),
      .cache = cache,
      .block_table = TensorView::of(d_table.get(), {kBatch, kMaxPages}),
      .cache_seqlens = TensorView::of(lengths.get(), {kBatch}),
      .softmax_scale = kScale,
      .out = TensorView::of(out.get(), {kBatch, 1, kHeads, kKvLoraRank}),
      .lse = {},
      .num_splits = 0,
      .numerics = {.p_block = 128}};

  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  cuda::append_kv({.latent = TensorView::of(d_latent.get(), {tokens, kKvLoraRank}),
                   .rope = TensorView::of(d_rope.get(), {tokens, kQkRopeHeadDim}),
                   .slot_mapping = TensorView::of(d_slots.get(), {tokens}),
                   .cache = cache},
                  stream);

  // One step as a graph: no call below allocates or synchronises.
  cudaGraph_t graph;
  cudaGraphExec_t step;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cuda::plan_decode(shape, decode.cache_seqlens, workspace, stream);
  cuda::quantize_q({.q_latent = TensorView::of(d_q.get(), {kBatch, 1, kHeads, kKvLoraRank}),
                    .q_rope = TensorView::of(d_q_rope.get(), {kBatch, 1, kHeads, kQkRopeHeadDim}),
                    .q_latent_out = decode.q_latent,
                    .q_rope_out = decode.q_rope,
                    .q_scale_out = decode.q_scale},
                   stream);
  cuda::mla_decode(decode, shape, workspace, stream);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&step, graph, 0));

  double worst = 0;
  for (const std::vector<std::int32_t>& now :
       {std::vector<std::int32_t>{1, 64, 500}, std::vector<std::int32_t>{200, 65, 512}}) {
    lengths.set(now);
    check(cudaGraphLaunch(step, stream));
    check(cudaStreamSynchronize(stream));
    const std::vector<float> got = out.values();
    for (std::int64_t b = 0; b < kBatch; ++b) {
      worst = std::max(worst,
                       worst_error(&q[static_cast<std::size_t>(b * kHeads * kKvLoraRank)],
                                   &q_rope[static_cast<std::size_t>(b * kHeads * kQkRopeHeadDim)],
                                   &latent[static_cast<std::size_t>(b * kMaxTokens * kKvLoraRank)],
                                   &rope[static_cast<std::size_t>(b * kMaxTokens * kQkRopeHeadDim)],
                                   now[static_cast<std::size_t>(b)],
                                   &got[static_cast<std::size_t>(b * kHeads * kKvLoraRank)]));
    }
  }
  cudaGraphExecDestroy(step);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  std::printf("%lld heads, two graph replays: largest relative error %.4f\n",
              static_cast<long long>(kBatch * kHeads), worst);
  // e4m3 keys, queries and probabilities: a few percent; the worst of these heads is 0.1016 off on
  // the cpu backend too.
  return worst < 0.105 ? 0 : 1;
}

}  // namespace

int main() {
  if (*cuda::unavailable_reason()) {
    std::printf("not run: %s\n", cuda::unavailable_reason());
    return 77;
  }
  try {
    return run();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
