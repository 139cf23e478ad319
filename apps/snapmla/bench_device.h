// Where `snapmla bench attention` runs. A new device is one file that implements AttentionDevice
// and one line in make_attention_device.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench.h"
#include "snapmla/mla.h"

namespace snapmla::app::bench {

// One shape to measure.
struct AttentionCase {
  KvCacheFormat format = KvCacheFormat::kFp8;
  std::int64_t heads = 0, seqlen_q = 1, batch = 1, context = 0;

  std::int64_t rows() const { return batch * seqlen_q * heads; }
  // Multiply-adds count two: 2 * (576 + 512) for every (row, visible token).
  double flops() const;
  double cache_bytes() const;  // every token once: 644, 1152 or 2304 bytes
};

// Its data on the host: `copies` caches with the same content in pages of their own, used in turn
// so that no run finds its keys in a processor cache, as in a model of many layers.
struct AttentionData {
  std::int64_t num_pages = 0, copies = 1;
  std::vector<std::uint8_t> pool;     // [num_pages] pages
  std::vector<std::int32_t> tables;   // [copies, batch, pages of one request], shuffled
  std::vector<std::int32_t> seqlens;  // [batch]
  std::vector<std::uint8_t>
      q_latent;  // [batch, seqlen_q, heads, 512] e4m3, bf16 or f32, as the cache
  std::vector<std::uint8_t> q_rope;  // [batch, seqlen_q, heads, 64] bf16, or f32 for an f32 cache
  std::vector<float> q_scale;        // [batch, seqlen_q, heads], FP8
  std::int64_t max_pages = 0;        // of one request
  float softmax_scale = 0;

  // Host arguments for one copy; out [batch, seqlen_q, heads, 512] f32, lse [batch, heads,
  // seqlen_q].
  MlaDecodeArgs args(const AttentionCase& c, std::int64_t copy, float* out, float* lse);
};

struct AttentionResult {
  std::vector<float> out, lse;  // as AttentionData::args says
};

// A shape that is ready to run: its data lie where the device wants them.
class AttentionRun {
 public:
  virtual ~AttentionRun() = default;
  virtual double time_once(std::int64_t copy) = 0;  // seconds of one decode over that copy
  virtual AttentionResult result() = 0;             // of the last decode, on the host
};

class AttentionDevice {
 public:
  virtual ~AttentionDevice() = default;
  virtual std::string name() const = 0;
  virtual int threads() const = 0;  // host threads that compute; 0 for others
  virtual nlohmann::ordered_json describe() const = 0;
  virtual Limits measure_limits() = 0;  // called between shapes; the best counts
  // `data` outlives the run.
  virtual std::unique_ptr<AttentionRun> prepare(const AttentionCase& shape,
                                                AttentionData& data) = 0;
};

// cpu or ref. Throws kUnsupported for a device that this build cannot measure.
std::unique_ptr<AttentionDevice> make_attention_device(const std::string& name, int threads);

}  // namespace snapmla::app::bench
