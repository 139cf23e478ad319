// One case of decode attention: a poisoned cache with keys in it, queries, and the call.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "agreement/memory.h"
#include "agreement/numbers.h"
#include "ops/ops.h"

namespace snapmla::agreement {

enum class Accumulation { kTwoLevel, kOneLevel, kTensorCore, kTensorCoreOneLevel };

struct Shape {
  KvCacheFormat format = KvCacheFormat::kFp8;
  PageImage image = PageImage::kSwizzled128;
  int p_block = 64, num_splits = 1;
  std::int64_t heads = 1, seqlen_q = 1;
  std::vector<std::int32_t> lengths = {1};
  bool separate = false;  // three tensors instead of a pool
  bool padded = false;    // strided queries and outputs
  bool lse = true;
  ScaleMode scale_mode = ScaleMode::kAmax;
  Accumulation accumulation = Accumulation::kTwoLevel;
  float softmax_scale = 0.07f;
};

struct Result {
  std::vector<float> out, lse;  // [rows, 512], [batch, heads, seqlen_q]
};

inline float truncated_to_bf16(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits &= 0xffff0000u;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline BFloat16 bf16_of(float v) { return BFloat16{bf16_bits(v)}; }

// Unused slots and pages hold NaN, unused table entries hold junk.
struct Problem {
  Shape shape;
  std::int64_t batch = 0, max_pages = 0;
  std::unique_ptr<Cache> cache;
  std::vector<std::int32_t> table;      // [batch, max_pages]
  std::vector<float> latent, rope;      // the keys as they were before the cache, in slot order
  std::vector<std::int64_t> slots;      // of the keys
  std::vector<float> q_latent, q_rope;  // [rows, 512], [rows, 64], before quantisation
  std::unique_ptr<Operand<float>> q_latent32, q_rope32, q_scale;
  std::unique_ptr<Operand<Float8E4M3>> q_codes;
  std::unique_ptr<Operand<BFloat16>> q_latent16, q_rope16;

  std::int64_t rows() const { return batch * shape.seqlen_q * shape.heads; }
  std::int32_t page(std::int64_t b, std::int64_t token) const {
    return table[static_cast<std::size_t>(b * max_pages + token / 64)];
  }
  Result decode(ops::OpSet& backend);
  // Rounded to bf16 by the backend's own output path.
  std::vector<BFloat16> decode_to_bf16(ops::OpSet& backend);

  // q of one row as the cache's number system holds it, times its scale: 576 numbers.
  std::vector<double> query(std::int64_t row) const;
  // One key: 576 numbers as stored; scale 1 where the format has none.
  double key(std::int64_t b, std::int64_t token, double* to) const;

 private:
  MlaDecodeArgs args();
};

// Fills the cache through `backend` and quantises the queries with it.
Problem make_problem(const Shape& shape, unsigned seed, ops::OpSet& backend);
void append(ops::OpSet& backend, Problem& p);
void prepare_queries(ops::OpSet& backend, Problem& p, std::mt19937& rng);

}  // namespace snapmla::agreement
