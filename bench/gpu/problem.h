// A decode problem that lives on the GPU: cache, page table, queries, outputs and workspace, made
// by the library's own append_kv and quantize_q from generated data.
//
// Everything that decode must not read is poisoned: the pool is filled with 0xff (NaN as e4m3, bf16
// and f32) before the keys are appended, unused table entries hold 2147480000, -1 and INT_MIN.
// Outputs start as NaN between guard bands; the workspace has a guard band behind it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "device.h"
#include "reference.h"
#include "snapmla/cuda.h"

namespace snapmla::gpu {

struct ProblemShape {
  KvCacheFormat format = KvCacheFormat::kFp8;
  PageImage image = PageImage::kSwizzled128;
  bool separate_tensors = false;  // three tensors with padded page strides instead of one pool
  std::int64_t heads = 128, seqlen_q = 1;
  std::vector<std::int32_t> lengths;  // one per request
  int p_block = 64;
  bool deterministic = false;
  DType out = DType::kBF16;
  std::int64_t row_padding = 0;  // elements behind each row of queries and output, a multiple of 16
  bool lse = true;               // whether decode is asked for it
  ScaleMode scale_mode = ScaleMode::kAmax;
  std::int64_t unused_pages = 0;       // pages of the pool that no request uses
  std::int64_t unused_columns = 0;     // columns of the table past the longest request
  std::int64_t first_page = 0;         // the pages used are first_page and up, shuffled
  float softmax_scale = 0.072168784f;  // 192^-0.5
  std::uint64_t seed = 1;

  std::int64_t batch() const { return static_cast<std::int64_t>(lengths.size()); }
  std::int64_t rows() const { return batch() * seqlen_q * heads; }
  std::int64_t tokens() const;
};

// Unquantised data, bf16. The default is normal deviates.
struct ProblemData {
  // Tokens [first, first + count) of all requests one after the other: [count, 512], [count, 64].
  std::function<void(BFloat16* latent, BFloat16* rope, std::int64_t first, std::int64_t count,
                     cudaStream_t)>
      keys;
  // [rows, 512], [rows, 64]
  std::function<void(BFloat16* latent, BFloat16* rope, std::int64_t rows, cudaStream_t)> queries;
};

class Problem {
 public:
  // ProblemData::keys is asked for at most this many tokens at a time.
  static constexpr std::int64_t kTokensAtOnce = 1 << 16;

  explicit Problem(const ProblemShape& shape, const ProblemData& data = {});

  const ProblemShape& shape() const { return shape_; }
  // Bytes of latent, rope and scale of all cached tokens: what a decode must read at least.
  double cache_bytes() const;
  // Rows of query heads and tokens that one CTA of the decode kernel computes on this GPU, with the
  // present lengths, and whether another plan of the same shape might have it compute others.
  std::int64_t rows_per_cta() const;
  bool plan_chooses_rows() const;
  // The same as the plan that was made last says, where it chose.
  std::int64_t planned_rows_per_cta() const;
  double flop() const;  // 2 * 1088 * (row, visible token) pairs of full length: the usual count

  void plan(cudaStream_t stream);
  void decode(cudaStream_t stream);       // with the plan made before
  void quantize(cudaStream_t stream);     // FP8: the queries again; otherwise nothing
  void append_last(cudaStream_t stream);  // the last seqlen_q tokens of every request again

  // Other lengths (no longer than at first) and another assignment of pages, in place, as an engine
  // does between replays of a captured graph. The cache's contents move along.
  void relabel_pages(std::uint64_t seed);
  void set_lengths(const std::vector<std::int32_t>& lengths);

  void poison_outputs();
  std::vector<float> out() const;  // [rows, 512]; the guard bands are checked, throws if written
  std::vector<float> lse() const;  // [batch, heads, seqlen_q]
  std::vector<std::uint8_t> out_bits() const;  // out and lse as bytes, for bitwise comparison
  void check_guards() const;

  ReferenceProblem reference() const;
  // Arguments that point to device memory, for tests that change one of them.
  MlaDecodeArgs decode_args() const;
  cuda::DecodeShape decode_shape() const;
  cuda::Workspace workspace() const;
  KvCacheView cache() const;
  const std::vector<std::int32_t>& table() const { return table_; }
  std::int64_t max_pages() const { return max_pages_; }
  float* scale_of(std::int64_t request, std::int64_t token) const;  // device pointer, FP8 only
  std::uint8_t* latent_code_of(std::int64_t request, std::int64_t token, int dim) const;

 private:
  void place_pages(std::uint64_t seed);
  void allocate_cache();
  void append_all(const ProblemData& data);
  void make_queries(const ProblemData& data);

  ProblemShape shape_;
  std::vector<std::int32_t> capacity_;  // lengths that there are pages for
  std::int64_t max_pages_ = 1, num_pages_ = 1;
  std::vector<std::int32_t> table_;
  DeviceBuffer<std::uint8_t> pool_, rope_pool_, scale_pool_;
  DeviceBuffer<std::int32_t> device_table_, device_lengths_;
  DeviceBuffer<BFloat16> raw_q_latent_, raw_q_rope_;  // padded rows
  DeviceBuffer<std::uint8_t> q_codes_;                // padded rows
  DeviceBuffer<BFloat16> q_rope_;                     // padded rows
  DeviceBuffer<float> q_scale_;
  DeviceBuffer<BFloat16> last_latent_, last_rope_;
  DeviceBuffer<std::int64_t> last_slots_;
  DeviceBuffer<std::uint8_t> out_, lse_, workspace_;
};

}  // namespace snapmla::gpu
