// Exact attention for chosen query rows, in double precision on the GPU, straight from the
// definition: every score, one softmax, one weighted sum. It shares no code with the library (its
// own page addressing, its own conversions), is slow and simple on purpose, and can also emulate in
// double what a quantised P does:
//
//   x_ij = log2(e) softmax_scale q_i . k_j          q, k: the values that cache and query stand for
//   exact         w_ij = 2^(x_ij - M_i),                       l_i = sum_j w_ij
//   per block     y_ij = x_ij + log2 s_j, m = max of y over a block of B tokens,
//                 w_ij = 2^(m - M_i) / 448 * e4m3(448 * 2^(y_ij - m)) / s_j,  l_i = sum_j w_ij
//   unscaled      w_ij = 2^(R - M_i) * e4m3(2^(x_ij - R)), R = running maximum after the block of
//   64,
//                 l_i = sum_j 2^(x_ij - M_i): what a kernel without a P scale computes
//   out_i = sum_j w_ij c_j / l_i,   lse_i = ln2 (M_i + log2 l_i);   no tokens: out 0, lse -inf
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "snapmla/dtype.h"

namespace snapmla::gpu {

// A paged cache as this file sees it: base pointers and strides in bytes.
struct ReferenceCache {
  DType element = DType::kE4M3;       // of the latent: e4m3 (scales needed), bf16
  bool swizzled = false;              // 128-byte column chunks with xor-ed units, else plain rows
  DType rope_element = DType::kBF16;  // bf16, or e4m3 for caches that store it so
  const std::uint8_t* latent = nullptr;
  const std::uint8_t* rope = nullptr;
  const std::uint8_t* scale = nullptr;  // null: 1
  std::int64_t latent_page = 0, rope_page = 0, scale_page = 0;
  std::int64_t latent_row = 0, rope_row = 0;  // plain rows only
};

struct ReferenceProblem {
  ReferenceCache cache;
  const void* q_latent = nullptr;  // [batch, seqlen_q, heads_q, 512] e4m3 or bf16
  const void* q_rope = nullptr;    // [batch, seqlen_q, heads_q, 64] bf16 (or e4m3)
  DType q_element = DType::kE4M3, q_rope_element = DType::kBF16;
  std::int64_t q_latent_row = 512, q_rope_row = 64;  // elements between consecutive heads
  const float* q_scale = nullptr;                    // [batch, seqlen_q, heads_q]; null: 1
  const std::int32_t* block_table = nullptr;         // device, [batch, table_stride]
  std::int64_t table_stride = 0;
  std::vector<std::int32_t> cache_seqlens;  // host
  std::int64_t batch = 0, seqlen_q = 1, heads_q = 0;
  double softmax_scale = 0;
};

struct ReferenceRow {
  std::int32_t batch, token, head;
};

// kOneLevel64, kTwoLevel64: kBlock64 with PV summed as Hopper's tensor cores do (32 products and
// the accumulator cut towards zero 13 bits below the largest exponent, of a product the sum of its
// operands'; the sum cut to 14 bits), in one chain over the whole context or started anew in each
// block. kTensorCore*: PV as kTwoLevel64, in blocks of 64 or 128, the latent part of the scores
// added up by the tensor core too, one chain of 16 groups of 32 in the order in which the FP8
// kernel takes them, and l from f16 products with f16 factors s_min / s_j and f16 sums of them, as
// the kernel forms it: with 64 rows a CTA sums of eight products, with fewer rows (kTensorCoreFew*)
// of one for each half of the block, that is one or two. That is what the kernel computes where a
// row sees all tokens of its last block (s_min is of those it sees here, of those that exist
// there). kOneLevel64 and all after it are for an e4m3 cache, kTensorCore* for an e4m3 query as
// well.
enum class PEmulation {
  kExact,
  kBlock64,
  kBlock128,
  kUnscaled,
  kOneLevel64,
  kTwoLevel64,
  kTensorCore64,
  kTensorCore128,
  kTensorCoreFew64,
  kTensorCoreFew128
};

struct ReferenceResult {
  std::vector<double> out;  // [rows, 512]
  std::vector<double> lse;  // [rows], natural logarithm
};

// `rows` in any order; rows of one request standing together are computed together.
ReferenceResult reference_attention(const ReferenceProblem& problem,
                                    const std::vector<ReferenceRow>& rows, cudaStream_t stream,
                                    PEmulation emulation = PEmulation::kExact);

// Every row, and up to `count` distinct rows chosen at random among requests, tokens and heads.
std::vector<ReferenceRow> all_rows(const ReferenceProblem& problem);
std::vector<ReferenceRow> sample_rows(const ReferenceProblem& problem, int count,
                                      std::uint64_t seed);

}  // namespace snapmla::gpu
