// Times mla_decode of the source tree that this program was built with; see run.
//
//   decode_ab NAME [--burst] SHAPE...
//
// SHAPE = HEADSxSEQLENxBATCHxCONTEXT with letters behind it: b BF16 cache, p P blocks of 64, r
// lengths log-uniform from 1,024 to CONTEXT, w a block table wide enough for 131,072 tokens. Ten
// calls in a CUDA graph; burst: after 0.2 s of idling, about 25 ms; sustained: 0.3 s after 0.5 s of
// the same load. Prints NAME, SHAPE, medians in us and TFLOP/s, and the difference between this
// shape's output and the previous one's where both have the same size (the same shape with and
// without b: 3%, else something is wrong).
#include <cuda_runtime.h>
#include <snapmla/cuda.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ops/ops.h"

// The operations' own checks live in a layer that needs the project's libraries; this program's
// arguments are its own.
namespace snapmla::ops {
void check_args(const FetchDequantArgs&) {}
void check_args(const QuantizeQArgs&) {}
void check_args(const AppendKvArgs&) {}
void check_args(const RoundLatentsArgs&) {}
}  // namespace snapmla::ops

namespace {

using namespace snapmla;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "error: %s\n", cudaGetErrorString(status));
  std::exit(1);
}

// Normal deviates from a counter.
__global__ void fill_normal(float* to, std::int64_t n, std::uint64_t seed) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < n;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    std::uint64_t x =
        static_cast<std::uint64_t>(i) * 0x9E3779B97F4A7C15u + seed * 0xD1B54A32D192ED03u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    const float u = (static_cast<float>(x >> 40) + 1.0f) * 0x1p-24f;
    const float v = static_cast<float>(x & 0xffffff) * 0x1p-24f;
    to[i] = sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v);
  }
}

__global__ void to_bf16(const float* from, std::uint16_t* to, std::int64_t n) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < n;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const unsigned bits = __float_as_uint(from[i]);
    to[i] = static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}

template <class T>
std::shared_ptr<T> device(std::int64_t n) {
  void* data = nullptr;
  check(cudaMalloc(&data, static_cast<std::size_t>(n) * sizeof(T)));
  return {static_cast<T*>(data), [](T* p) { cudaFree(p); }};
}

std::shared_ptr<float> normal(std::int64_t n, std::uint64_t seed) {
  auto to = device<float>(n);
  fill_normal<<<1024, 256>>>(to.get(), n, seed);
  return to;
}

template <class T>
std::shared_ptr<T> upload(const std::vector<T>& from) {
  auto to = device<T>(static_cast<std::int64_t>(from.size()));
  check(cudaMemcpy(to.get(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  return to;
}

// Kept from shape to shape: filling it takes longer than a measurement.
struct Pool {
  KvCacheFormat format{};
  std::int64_t pages = 0;
  std::shared_ptr<std::uint8_t> data;

  KvCacheView view(KvCacheFormat wanted, std::int64_t least) {
    if (format != wanted || pages < least) {
      data.reset();
      format = wanted;
      pages = least;
      data = device<std::uint8_t>(pages * page_layout(format).page_bytes);
      const auto cache = KvCacheView::of_pool(data.get(), pages, format);
      constexpr std::int64_t kTokens = 1 << 16;
      for (std::int64_t first = 0; first < pages * kPageSize; first += kTokens) {
        const std::int64_t n = std::min(kTokens, pages * kPageSize - first);
        std::vector<std::int64_t> slots(static_cast<std::size_t>(n));
        std::iota(slots.begin(), slots.end(), first);
        const auto latent = normal(n * kKvLoraRank, 2 * static_cast<std::uint64_t>(first) + 1);
        const auto rope = normal(n * kQkRopeHeadDim, 2 * static_cast<std::uint64_t>(first) + 2);
        const auto where = upload(slots);
        cuda::append_kv({.latent = TensorView::of(latent.get(), {n, kKvLoraRank}),
                         .rope = TensorView::of(rope.get(), {n, kQkRopeHeadDim}),
                         .slot_mapping = TensorView::of(where.get(), {n}),
                         .cache = cache},
                        nullptr);
        check(cudaDeviceSynchronize());
      }
    }
    return KvCacheView::of_pool(data.get(), pages, format);
  }
};

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

void measure(const std::string& name, const std::string& spec, bool burst_only, Pool& pool,
             std::vector<std::uint16_t>& previous) {
  int h = 0, s = 0, batch = 0, context = 0;
  if (std::sscanf(spec.c_str(), "%dx%dx%dx%d", &h, &s, &batch, &context) != 4 || h < 1 || s < 1 ||
      batch < 1 || context < 1) {
    std::fprintf(stderr,
                 "error: got shape '%s', accepted is HEADSxSEQLENxBATCHxCONTEXT[b][p][r][w]\n",
                 spec.c_str());
    std::exit(2);
  }
  const auto has = [&](char letter) {
    return spec.find(letter, spec.rfind('x') + 1) != std::string::npos;
  };
  const auto format = has('b') ? KvCacheFormat::kBf16 : KvCacheFormat::kFp8;
  std::mt19937 random(5);
  std::vector<std::int32_t> lengths(static_cast<std::size_t>(batch), context);
  if (has('r')) {
    std::uniform_real_distribution<double> log_length(std::log(std::min(1024, context)),
                                                      std::log(context));
    for (auto& length : lengths) length = static_cast<std::int32_t>(std::exp(log_length(random)));
  }
  const std::int64_t columns =
      (std::max(context, has('w') ? 131072 : 0) + kPageSize - 1) / kPageSize;
  std::int64_t pages = 0, tokens = 0;
  for (const auto length : lengths) {
    pages += (length + kPageSize - 1) / kPageSize;
    tokens += length;
  }
  const KvCacheView cache = pool.view(format, pages);
  std::vector<std::int32_t> order(static_cast<std::size_t>(pages));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  std::vector<std::int32_t> table(static_cast<std::size_t>(batch * columns), 0);
  std::size_t next = 0;
  for (int b = 0; b < batch; ++b) {
    const std::int64_t own = (lengths[static_cast<std::size_t>(b)] + kPageSize - 1) / kPageSize;
    for (std::int64_t i = 0; i < own; ++i)
      table[static_cast<std::size_t>(b * columns + i)] = order[next++];
  }
  const auto d_table = upload(table);
  const auto d_lengths = upload(lengths);

  const std::int64_t rows = std::int64_t{batch} * s * h;
  const auto q = normal(rows * kKvLoraRank, 11), q_rope = normal(rows * kQkRopeHeadDim, 12);
  const auto q_bf16 = device<BFloat16>(rows * kKvLoraRank),
             rope_bf16 = device<BFloat16>(rows * kQkRopeHeadDim);
  const auto codes = device<Float8E4M3>(rows * kKvLoraRank);
  const auto scale = device<float>(rows);
  const auto out = device<BFloat16>(rows * kKvLoraRank);
  if (format == KvCacheFormat::kFp8) {
    cuda::quantize_q({.q_latent = TensorView::of(q.get(), {batch, s, h, kKvLoraRank}),
                      .q_rope = TensorView::of(q_rope.get(), {batch, s, h, kQkRopeHeadDim}),
                      .q_latent_out = TensorView::of(codes.get(), {batch, s, h, kKvLoraRank}),
                      .q_rope_out = TensorView::of(rope_bf16.get(), {batch, s, h, kQkRopeHeadDim}),
                      .q_scale_out = TensorView::of(scale.get(), {batch, s, h})},
                     nullptr);
  } else {
    to_bf16<<<1024, 256>>>(q.get(), reinterpret_cast<std::uint16_t*>(q_bf16.get()),
                           rows * kKvLoraRank);
    to_bf16<<<1024, 256>>>(q_rope.get(), reinterpret_cast<std::uint16_t*>(rope_bf16.get()),
                           rows * kQkRopeHeadDim);
  }
  check(cudaDeviceSynchronize());

  const cuda::DecodeShape shape{
      .batch = batch, .seqlen_q = s, .heads_q = h, .max_pages = columns, .format = format};
  const std::int64_t bytes = cuda::decode_workspace_bytes(shape);
  const auto memory = device<std::uint8_t>(bytes);
  const cuda::Workspace workspace{memory.get(), bytes};
  MlaDecodeArgs args;
  if (format == KvCacheFormat::kFp8) {
    args.q_latent = TensorView::of(codes.get(), {batch, s, h, kKvLoraRank});
    args.q_scale = TensorView::of(scale.get(), {batch, s, h});
  } else {
    args.q_latent = TensorView::of(q_bf16.get(), {batch, s, h, kKvLoraRank});
  }
  args.q_rope = TensorView::of(rope_bf16.get(), {batch, s, h, kQkRopeHeadDim});
  args.cache = cache;
  args.block_table = TensorView::of(d_table.get(), {batch, columns});
  args.cache_seqlens = TensorView::of(d_lengths.get(), {batch});
  args.softmax_scale = 1.0f / std::sqrt(192.0f);
  args.out = TensorView::of(out.get(), {batch, s, h, kKvLoraRank});
  args.numerics.p_block = has('p') ? 64 : 128;

  constexpr int kCalls = 10;
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  cudaEvent_t start = nullptr, end = nullptr;
  check(cudaStreamCreate(&stream));
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&end));
  cuda::plan_decode(shape, args.cache_seqlens, workspace, stream);
  check(cudaStreamSynchronize(stream));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kCalls; ++i) cuda::mla_decode(args, shape, workspace, stream);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&replay, graph, 0));
  const auto once = [&] {  // us of one call
    check(cudaEventRecord(start, stream));
    check(cudaGraphLaunch(replay, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, end));
    return ms * 1e3 / kCalls;
  };
  const auto sample = [&](double us) {
    std::vector<double> times;
    for (double sum = 0; sum < us; sum += times.back() * kCalls) times.push_back(once());
    return median(times);
  };
  once();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  once();
  const double burst = sample(25e3);
  double sustained = 0;
  if (!burst_only) {
    sample(5e5);
    sustained = sample(3e5);
  }
  const double tera = 2.0 * 1088 * h * s * static_cast<double>(tokens) * 1e-6;
  std::printf("%-8s %-18s %8.2f %8.2f us %6.0f %6.0f TFLOP/s", name.c_str(), spec.c_str(), burst,
              sustained, tera / burst, sustained > 0 ? tera / sustained : 0.0);
  std::vector<std::uint16_t> now(static_cast<std::size_t>(rows * kKvLoraRank));
  check(cudaMemcpy(now.data(), out.get(), now.size() * 2, cudaMemcpyDeviceToHost));
  if (now.size() == previous.size()) {
    const auto value = [](std::uint16_t bits) {
      const std::uint32_t wide = std::uint32_t{bits} << 16;
      float x = 0;
      std::memcpy(&x, &wide, 4);
      return double{x};
    };
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < now.size(); ++i) {
      const double d = value(now[i]) - value(previous[i]);
      error += d * d;
      norm += value(previous[i]) * value(previous[i]);
    }
    std::printf("  differs by %.4f", std::sqrt(error / norm));
  }
  std::printf("\n");
  std::fflush(stdout);
  previous = std::move(now);
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaEventDestroy(start);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s NAME [--burst] SHAPE...\n", argv[0]);
    return 2;
  }
  if (*cuda::unavailable_reason()) {
    std::fprintf(stderr, "error: %s\n", cuda::unavailable_reason());
    return 77;
  }
  bool burst_only = false;
  Pool pool;
  std::vector<std::uint16_t> previous;
  try {
    for (int i = 2; i < argc; ++i) {
      if (std::string(argv[i]) == "--burst") {
        burst_only = true;
      } else {
        measure(argv[1], argv[i], burst_only, pool, previous);
      }
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
}
