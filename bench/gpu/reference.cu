#include "reference.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <stdexcept>
#include <tuple>

#include "device.h"
#include "fill.h"

namespace snapmla::gpu {
namespace {

constexpr int kPage = 64, kLatent = 512, kRope = 64;
constexpr int kRowsAtOnce = 128;
constexpr int kThreads = 256;

__device__ double e4m3_value(std::uint8_t code) {
  const __half_raw h = __nv_cvt_fp8_to_halfraw(code, __NV_E4M3);
  return static_cast<double>(__half2float(__half(h)));
}
__device__ double bf16_value(std::uint16_t bits) {
  return static_cast<double>(__uint_as_float(static_cast<unsigned>(bits) << 16));
}
__device__ double value_at(const std::uint8_t* p, DType type) {
  return type == DType::kE4M3 ? e4m3_value(*p)
                              : bf16_value(*reinterpret_cast<const std::uint16_t*>(p));
}
__device__ int width(DType type) { return type == DType::kE4M3 ? 1 : 2; }

// Round to nearest even e4m3, values 0..448. The conversion starts from float, whose rounding of
// the double is 2^-24: harmless unless it lands on a tie, which random data does not do.
__device__ double round_e4m3(double x) {
  return e4m3_value(__nv_cvt_float_to_fp8(static_cast<float>(x), __NV_SATFINITE, __NV_E4M3));
}

__device__ const std::uint8_t* element(const std::uint8_t* plane, bool swizzled,
                                       std::int64_t row_bytes, int token, int byte) {
  if (!swizzled) return plane + token * row_bytes + byte;
  const int column = byte / 128, within = byte % 128;
  return plane + column * (kPage * 128) + token * 128 + ((within / 16) ^ (token % 8)) * 16 +
         within % 16;
}

struct Rows {
  const std::int64_t* q_row;  // [rows] flat (batch, token, head) number
  const std::int64_t* keys;   // [rows] how many tokens the row sees
  int count;
};

struct Request {
  ReferenceCache cache;
  const std::int32_t* table;  // this request's
  const std::uint8_t *q_latent, *q_rope;
  DType q_element, q_rope_element;
  std::int64_t q_latent_row, q_rope_row;
  const float* q_scale;
  double scale_log2;
};

__device__ double token_scale(const Request& p, std::int64_t j) {
  if (p.cache.scale == nullptr) return 1.0;
  const std::uint8_t* plane = p.cache.scale + p.table[j / kPage] * p.cache.scale_page;
  return static_cast<double>(reinterpret_cast<const float*>(plane)[j % kPage]);
}

__device__ double warp_sum(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// What the tensor core takes for the exponent of a product of e4m3 values: the sum of theirs, that
// of a subnormal being -6. Of a product that is 0, none.
constexpr int kNoExponent = -1000;
__device__ int product_exponent(float a, float b) {
  return a == 0.0f || b == 0.0f ? kNoExponent : max(ilogbf(a), -6) + max(ilogbf(b), -6);
}
__device__ int exponent(float x) { return x == 0.0f ? kNoExponent : ilogbf(x); }

// A sum after it is formed: 14 significant bits, cut towards zero.
__device__ float cut_sum(double sum) {
  return __uint_as_float(__float_as_uint(static_cast<float>(sum)) & 0xfffffc00u);
}

// The latent part of a score as the tensor core adds it, a lane per product of a group: e4m3 only.
__device__ double tensor_core_score(const Request& p, const std::uint8_t* q,
                                    const std::uint8_t* latent, int token, int lane) {
  float sum = 0;
  for (int group = 0; group < kLatent / 32; ++group) {
    constexpr int kChunks[4] = {0, 2, 1, 3};  // of 128 dimensions
    const int d = kChunks[group / 4] * 128 + group % 4 * 32 + lane;
    const auto a = static_cast<float>(e4m3_value(q[d]));
    const auto b = static_cast<float>(
        e4m3_value(*element(latent, p.cache.swizzled, p.cache.latent_row, token, d)));
    int largest = max(exponent(sum), product_exponent(a, b));
    for (int step = 16; step > 0; step /= 2)
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    if (largest == kNoExponent) continue;
    const double unit = ldexp(1.0, largest - 13);
    sum = cut_sum((trunc(sum / unit) + warp_sum(trunc(static_cast<double>(a * b) / unit))) * unit);
  }
  return sum;
}

// x [rows, keys] in base 2. One warp per token and row.
template <bool kTensorCore>
__global__ void score_kernel(Request p, Rows rows, std::int64_t keys, double* x) {
  const int lane = threadIdx.x % 32;
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int r = static_cast<int>(blockIdx.y);
  if (j >= rows.keys[r]) return;
  const std::int64_t page = p.table[j / kPage];
  const int token = static_cast<int>(j % kPage);
  const std::uint8_t* latent = p.cache.latent + page * p.cache.latent_page;
  const std::uint8_t* rope = p.cache.rope + page * p.cache.rope_page;
  const int kw = width(p.cache.element), krw = width(p.cache.rope_element);
  const int qw = width(p.q_element), qrw = width(p.q_rope_element);
  const std::uint8_t* q = p.q_latent + rows.q_row[r] * p.q_latent_row * qw;
  const std::uint8_t* qr = p.q_rope + rows.q_row[r] * p.q_rope_row * qrw;
  double sum = 0;
  for (int d = lane; d < kRope; d += 32) {
    sum += value_at(qr + d * qrw, p.q_rope_element) *
           value_at(element(rope, p.cache.swizzled, p.cache.rope_row, token, d * krw),
                    p.cache.rope_element);
  }
  if constexpr (kTensorCore) {
    sum = warp_sum(sum) + tensor_core_score(p, q, latent, token, lane);
  } else {
    for (int d = lane; d < kLatent; d += 32) {
      sum += value_at(q + d * qw, p.q_element) *
             value_at(element(latent, p.cache.swizzled, p.cache.latent_row, token, d * kw),
                      p.cache.element);
    }
    sum = warp_sum(sum);
  }
  if (lane != 0) return;
  const double q_scale = p.q_scale == nullptr ? 1.0 : static_cast<double>(p.q_scale[rows.q_row[r]]);
  x[r * keys + j] = sum * q_scale * token_scale(p, j) * p.scale_log2;
}

template <class F>
__device__ double block_reduce(double value, F&& combine) {
  __shared__ double shared[kThreads];
  __syncthreads();
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int n = kThreads / 2; n > 0; n /= 2) {
    if (threadIdx.x < n)
      shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + n]);
    __syncthreads();
  }
  return shared[0];
}

__device__ double larger(double a, double b) { return a != a ? a : (b != b ? b : fmax(a, b)); }

// x -> weights (already divided by l) in place, and lse. One block of threads per row.
__global__ void weight_kernel(Request p, Rows rows, std::int64_t keys, PEmulation emulation,
                              double* x, double* lse) {
  const int r = static_cast<int>(blockIdx.x);
  double* row = x + r * keys;
  const std::int64_t n = rows.keys[r];
  const double infinity = __longlong_as_double(0x7ff0000000000000ll);
  double top = -infinity;
  for (std::int64_t j = threadIdx.x; j < n; j += kThreads) top = larger(top, row[j]);
  top = block_reduce(top, larger);
  if (n == 0) {
    if (threadIdx.x == 0) lse[r] = -infinity;
    return;
  }
  const auto add = [](double a, double b) { return a + b; };
  double sum = 0;
  if (emulation == PEmulation::kExact) {
    for (std::int64_t j = threadIdx.x; j < n; j += kThreads) sum += row[j] = exp2(row[j] - top);
  } else {
    // One thread per block of tokens; the running maximum of kUnscaled is found by looking back.
    const int block = emulation == PEmulation::kBlock128 ? 128 : 64;
    const std::int64_t blocks = (n + block - 1) / block;
    if (emulation == PEmulation::kUnscaled) {
      __shared__ double running;
      if (threadIdx.x == 0) running = -infinity;
      for (std::int64_t k = 0; k < blocks; ++k) {
        __syncthreads();
        const std::int64_t j = k * block + threadIdx.x;
        const bool mine = threadIdx.x < block && j < n;
        const double m = block_reduce(mine ? row[j] : -infinity, larger);
        const double reference = larger(running, m);
        __syncthreads();
        if (threadIdx.x == 0) running = reference;
        if (mine) {
          sum += exp2(row[j] - top);
          row[j] = exp2(reference - top) * round_e4m3(exp2(row[j] - reference));
        }
      }
    } else {
      for (std::int64_t k = threadIdx.x; k < blocks; k += kThreads) {
        const std::int64_t begin = k * block, end = min(begin + block, n);
        double m = -infinity;
        for (std::int64_t j = begin; j < end; ++j) {
          m = larger(m, row[j] + log2(token_scale(p, j)));
        }
        for (std::int64_t j = begin; j < end; ++j) {
          const double s = token_scale(p, j);
          const double code = round_e4m3(448.0 * exp2(row[j] + log2(s) - m));
          sum += row[j] = exp2(m - top) / 448.0 * code / s;
        }
      }
    }
  }
  sum = block_reduce(sum, add);
  for (std::int64_t j = threadIdx.x; j < n; j += kThreads) row[j] /= sum;
  if (threadIdx.x == 0) lse[r] = (top + log2(sum)) * 0.69314718055994530942;
}

// out [rows, 512] += weights [rows, keys] x values. A block of threads takes `span` tokens of a
// row.
__global__ void output_kernel(Request p, Rows rows, std::int64_t keys, int span, const double* w,
                              double* out) {
  const int r = static_cast<int>(blockIdx.y);
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * span;
  const std::int64_t end = min(begin + span, rows.keys[r]);
  if (begin >= end) return;
  const int kw = width(p.cache.element);
  double sum[kLatent / kThreads] = {};
  for (std::int64_t j = begin; j < end; ++j) {
    const std::uint8_t* latent = p.cache.latent + p.table[j / kPage] * p.cache.latent_page;
    const double weight = w[r * keys + j] * token_scale(p, j);
    for (int i = 0; i < kLatent / kThreads; ++i) {
      const int d = i * kThreads + static_cast<int>(threadIdx.x);
      sum[i] += weight * value_at(element(latent, p.cache.swizzled, p.cache.latent_row,
                                          static_cast<int>(j % kPage), d * kw),
                                  p.cache.element);
    }
  }
  for (int i = 0; i < kLatent / kThreads; ++i) {
    atomicAdd(out + static_cast<std::int64_t>(r) * kLatent + i * kThreads + threadIdx.x, sum[i]);
  }
}

// accumulator + sum of a_i b_i as the tensor core adds them; see PEmulation.
__device__ float tensor_core_add(float accumulator, const float* a, const float* b, int count) {
  int largest = exponent(accumulator);
  for (int i = 0; i < count; ++i) largest = max(largest, product_exponent(a[i], b[i]));
  if (largest == kNoExponent) return accumulator;
  const double unit = ldexp(1.0, largest - 13);
  double sum = trunc(accumulator / unit);
  for (int i = 0; i < count; ++i) sum += trunc(static_cast<double>(a[i] * b[i]) / unit);
  return cut_sum(sum * unit);
}

// How l is summed: without rounding, or as the FP8 kernel does with 64 rows a CTA or with fewer.
enum class RowSum { kExact, kWide, kFew };

// sum_j code_j / s_j of a block, from f16 factors s_min / s_j and f16 sums, added up further
// without rounding: of the eight tokens 64 a + 8 n + i, n = 0..7 (kWide), or of the tokens that are
// 64 apart (kFew).
template <int kBlock, RowSum kHow>
__device__ double rounded_row_sum(const float* code, const float* scale, int count) {
  constexpr int kStep = kHow == RowSum::kWide ? 8 : 64, kSpan = kHow == RowSum::kWide ? 64 : kBlock;
  float smallest = scale[0];
  for (int j = 1; j < count; ++j) smallest = fminf(smallest, scale[j]);
  double sum = 0;
  for (int a = 0; a < kBlock; a += kSpan) {
    for (int i = 0; i < kStep; ++i) {
      __half part = __float2half_rn(0.0f);
      for (int j = a + i; j < min(a + kSpan, count); j += kStep)
        part = __hfma(__float2half_rn(code[j]), __float2half_rn(smallest / scale[j]), part);
      sum += static_cast<double>(__half2float(part));
    }
  }
  return sum / static_cast<double>(smallest);
}

// x -> out [rows, 512] and lse through the tensor core's accumulation, P in blocks of kBlock
// tokens. One block of threads per row; a thread owns two dimensions and walks along the tokens.
template <int kBlock, RowSum kRowSum>
__global__ void tensor_core_kernel(Request p, Rows rows, std::int64_t keys, bool two_level,
                                   const double* x, double* out, double* lse) {
  constexpr int kGroup = 32, kDims = kLatent / kThreads;
  __shared__ float code[kBlock], scale[kBlock];
  const int r = static_cast<int>(blockIdx.x);
  const double* row = x + r * keys;
  const std::int64_t n = rows.keys[r];
  const double infinity = __longlong_as_double(0x7ff0000000000000ll);
  double top = -infinity;
  for (std::int64_t j = threadIdx.x; j < n; j += kThreads) top = larger(top, row[j]);
  top = block_reduce(top, larger);
  const auto add = [](double a, double b) { return a + b; };
  double l = 0, sum[kDims] = {};
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const int count = static_cast<int>(min(static_cast<std::int64_t>(kBlock), n - begin));
    const bool mine = static_cast<int>(threadIdx.x) < count;
    const double s = mine ? token_scale(p, begin + threadIdx.x) : 1.0;
    const double y = mine ? row[begin + threadIdx.x] + log2(s) : -infinity;
    const double m = block_reduce(y, larger);
    const double sigma = exp2(m - top) / 448.0;
    double share = 0;
    if (mine) {
      code[threadIdx.x] = static_cast<float>(round_e4m3(448.0 * exp2(y - m)));
      scale[threadIdx.x] = static_cast<float>(s);
      share = sigma * code[threadIdx.x] / s;
    }
    share = block_reduce(share, add);  // also publishes code[] and scale[]
    if constexpr (kRowSum == RowSum::kExact) {
      l += share;
    } else {
      // One thread's work; all meet it where the loop ends.
      if (threadIdx.x == 0) l += sigma * rounded_row_sum<kBlock, kRowSum>(code, scale, count);
    }
    for (int i = 0; i < kDims; ++i) {
      const int d = i * kThreads + static_cast<int>(threadIdx.x);
      float t = two_level || sigma == 0.0 ? 0.0f : static_cast<float>(sum[i] / sigma);
      for (int at = 0; at < count; at += kGroup) {
        float latents[kGroup];
        const int group = min(kGroup, count - at);
        for (int k = 0; k < group; ++k) {
          const std::int64_t j = begin + at + k;
          const std::uint8_t* latent = p.cache.latent + p.table[j / kPage] * p.cache.latent_page;
          latents[k] = static_cast<float>(
              value_at(element(latent, p.cache.swizzled, p.cache.latent_row,
                               static_cast<int>(j % kPage), d * width(p.cache.element)),
                       p.cache.element));
        }
        t = tensor_core_add(t, code + at, latents, group);
      }
      sum[i] = two_level ? sum[i] + sigma * t : (sigma == 0.0 ? sum[i] : sigma * t);
    }
    __syncthreads();
  }
  l = block_reduce(threadIdx.x == 0 ? l : 0.0, add);
  for (int i = 0; i < kDims; ++i) {
    out[static_cast<std::int64_t>(r) * kLatent + i * kThreads + threadIdx.x] =
        n == 0 ? 0.0 : sum[i] / l;
  }
  if (threadIdx.x == 0) lse[r] = n == 0 ? -infinity : (top + log2(l)) * 0.69314718055994530942;
}

}  // namespace

ReferenceResult reference_attention(const ReferenceProblem& problem,
                                    const std::vector<ReferenceRow>& rows, cudaStream_t stream,
                                    PEmulation emulation) {
  // Scores and l as the FP8 kernel sums them, too.
  const bool whole =
      emulation == PEmulation::kTensorCore64 || emulation == PEmulation::kTensorCore128 ||
      emulation == PEmulation::kTensorCoreFew64 || emulation == PEmulation::kTensorCoreFew128;
  const bool sums =
      whole || emulation == PEmulation::kOneLevel64 || emulation == PEmulation::kTwoLevel64;
  if ((sums && problem.cache.element != DType::kE4M3) ||
      (whole && problem.q_element != DType::kE4M3)) {
    throw std::invalid_argument(
        "emulation: got the tensor core's sums of a cache or query that is "
        "not e4m3, accepted are e4m3 ones");
  }
  ReferenceResult result;
  result.out.assign(rows.size() * kLatent, 0.0);
  result.lse.assign(rows.size(), 0.0);
  std::int64_t longest = 1;
  for (const std::int32_t n : problem.cache_seqlens) longest = std::max<std::int64_t>(longest, n);
  DeviceBuffer<double> x(kRowsAtOnce * longest), out(kRowsAtOnce * kLatent), lse(kRowsAtOnce);
  DeviceBuffer<std::int64_t> q_row(kRowsAtOnce), keys(kRowsAtOnce);

  for (std::size_t begin = 0; begin < rows.size();) {
    std::size_t end = begin;
    std::vector<std::int64_t> numbers, seen;
    const std::int32_t b = rows[begin].batch;
    const std::int64_t length = problem.cache_seqlens.at(static_cast<std::size_t>(b));
    for (; end < rows.size() && rows[end].batch == b && end - begin < kRowsAtOnce; ++end) {
      const ReferenceRow& row = rows[end];
      numbers.push_back((b * problem.seqlen_q + row.token) * problem.heads_q + row.head);
      seen.push_back(std::max<std::int64_t>(0, length - problem.seqlen_q + row.token + 1));
    }
    const int count = static_cast<int>(end - begin);
    const std::int64_t most =
        std::max<std::int64_t>(1, *std::max_element(seen.begin(), seen.end()));
    q_row.upload(numbers);
    keys.upload(seen);
    out.fill_bytes(0);
    SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
    const Request request{problem.cache,
                          problem.block_table + b * problem.table_stride,
                          static_cast<const std::uint8_t*>(problem.q_latent),
                          static_cast<const std::uint8_t*>(problem.q_rope),
                          problem.q_element,
                          problem.q_rope_element,
                          problem.q_latent_row,
                          problem.q_rope_row,
                          problem.q_scale,
                          problem.softmax_scale * 1.44269504088896340736};
    const Rows device_rows{q_row.data(), keys.data(), count};
    const auto y = static_cast<unsigned>(count);
    constexpr int kTokensPerBlock = kThreads / 32, kSpan = 512;
    const dim3 tokens(static_cast<unsigned>((most + kTokensPerBlock - 1) / kTokensPerBlock), y);
    (whole ? score_kernel<true> : score_kernel<false>)<<<tokens, kThreads, 0, stream>>>(
        request, device_rows, most, x.data());
    SNAPMLA_CUDA_CHECK(cudaGetLastError());
    if (sums) {
      const auto kernel = [&] {
        switch (emulation) {
          case PEmulation::kTensorCore64:
            return tensor_core_kernel<64, RowSum::kWide>;
          case PEmulation::kTensorCore128:
            return tensor_core_kernel<128, RowSum::kWide>;
          case PEmulation::kTensorCoreFew64:
            return tensor_core_kernel<64, RowSum::kFew>;
          case PEmulation::kTensorCoreFew128:
            return tensor_core_kernel<128, RowSum::kFew>;
          default:
            return tensor_core_kernel<64, RowSum::kExact>;
        }
      }();
      kernel<<<y, kThreads, 0, stream>>>(request, device_rows, most,
                                         emulation != PEmulation::kOneLevel64, x.data(), out.data(),
                                         lse.data());
    } else {
      weight_kernel<<<y, kThreads, 0, stream>>>(request, device_rows, most, emulation, x.data(),
                                                lse.data());
      SNAPMLA_CUDA_CHECK(cudaGetLastError());
      output_kernel<<<dim3(static_cast<unsigned>((most + kSpan - 1) / kSpan), y), kThreads, 0,
                      stream>>>(request, device_rows, most, kSpan, x.data(), out.data());
    }
    SNAPMLA_CUDA_CHECK(cudaGetLastError());
    SNAPMLA_CUDA_CHECK(cudaStreamSynchronize(stream));
    const auto values = out.download(0, count * kLatent);
    std::copy(values.begin(), values.end(),
              result.out.begin() + static_cast<std::ptrdiff_t>(begin * kLatent));
    const auto logs = lse.download(0, count);
    std::copy(logs.begin(), logs.end(), result.lse.begin() + static_cast<std::ptrdiff_t>(begin));
    begin = end;
  }
  return result;
}

std::vector<ReferenceRow> all_rows(const ReferenceProblem& problem) {
  std::vector<ReferenceRow> rows;
  for (std::int32_t b = 0; b < problem.batch; ++b) {
    for (std::int32_t t = 0; t < problem.seqlen_q; ++t) {
      for (std::int32_t h = 0; h < problem.heads_q; ++h) rows.push_back({b, t, h});
    }
  }
  return rows;
}

std::vector<ReferenceRow> sample_rows(const ReferenceProblem& problem, int count,
                                      std::uint64_t seed) {
  const std::int64_t total = problem.batch * problem.seqlen_q * problem.heads_q;
  std::set<std::tuple<std::int32_t, std::int32_t, std::int32_t>> chosen;
  const auto wanted = static_cast<std::size_t>(std::min<std::int64_t>(count, total));
  while (chosen.size() < wanted) {
    const auto n = static_cast<std::int64_t>(mix(seed) % static_cast<std::uint64_t>(total));
    const std::int64_t head = n % problem.heads_q, rest = n / problem.heads_q;
    chosen.insert({static_cast<std::int32_t>(rest / problem.seqlen_q),
                   static_cast<std::int32_t>(rest % problem.seqlen_q),
                   static_cast<std::int32_t>(head)});
  }
  std::vector<ReferenceRow> rows;
  for (const auto& [b, t, h] : chosen) rows.push_back({b, t, h});
  return rows;
}

}  // namespace snapmla::gpu
