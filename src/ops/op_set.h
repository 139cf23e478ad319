// OpSet: every operation the forward pass needs, as one interface. ref is the executable
// specification, cpu the fast host backend, cuda the device. The functions in ops/ops.h validate
// arguments by name and then call the backend: a backend may assume that shapes, types and strides
// are right.
//
// All operations are row-independent BIT FOR BIT: the result for one row (token) does not depend on
// how many other rows are in the call. Chunk-invariant prefill and prefix reuse rest on this.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/rounding.h"
#include "ops/study.h"
#include "snapmla/kv_cache.h"
#include "snapmla/mla.h"
#include "snapmla/tensor.h"
#include "tensor/memory.h"

namespace snapmla::ops {

// A weight matrix [out, in] as the checkpoint stores it.
struct Weight {
  TensorView data;       // [out, in] f32, bf16 or e4m3
  TensorView scale_inv;  // e4m3: [ceil(out/128), ceil(in/128)] f32, multiplies; else empty
  std::int64_t out_features() const { return data.dim(0); }
  std::int64_t in_features() const { return data.dim(1); }
};

// y = x W^T, accumulated in f32 (ref: double), result f32.
struct LinearArgs {
  TensorView x;    // [num_tokens, in] f32
  Weight weight;   // [out, in]
  TensorView out;  // [num_tokens, out] f32
};

// y[t, h, :] = W[h] x[t, h, :] for the per-head absorb matrices.
struct HeadLinearArgs {
  TensorView x;       // [num_tokens, heads, in] f32
  TensorView weight;  // [heads, out, in] f32 or bf16
  TensorView out;     // [num_tokens, heads, out] f32
};

// y = w * x / sqrt(mean(x^2) + eps); out may alias x.
struct RmsNormArgs {
  TensorView x;       // [num_tokens, width] f32
  TensorView weight;  // [width] f32 or bf16
  float eps = 1e-6f;
  TensorView out;  // [num_tokens, width] f32
};

// Rotates in place. Interleaved: pair (2j, 2j+1). Half: pair (j, j + width/2); to_interleaved then
// leaves the result of pair j at (2j, 2j+1), as pages hold it.
struct RopeArgs {
  TensorView x;          // [num_tokens, heads, width] f32
  TensorView positions;  // [num_tokens] i32
  TensorView cos_sin;    // [max_position, width] f32: row p = cos_0, sin_0, cos_1, sin_1, ... (from
                         // fp64 tables)
  bool interleaved = true;
  bool to_interleaved = false;
};

// out = silu(gate) * up; out may alias gate.
struct SwigluArgs {
  TensorView gate;  // [num_tokens, width] f32
  TensorView up;    // [num_tokens, width] f32
  TensorView out;   // [num_tokens, width] f32
};

enum class RouterKind : std::uint8_t {
  kGreedySoftmax,
  kGroupLimitedGreedySoftmax,
  kNoAuxTcSigmoid
};

struct MoeRouteArgs {
  TensorView logits;  // [num_tokens, experts] f32
  TensorView
      bias;  // [experts] f32 (kNoAuxTcSigmoid) or empty: used in the choice, never in the weights
  RouterKind kind = RouterKind::kNoAuxTcSigmoid;
  int num_groups = 1, groups_kept = 1, top_k = 1;
  bool normalize = true;        // norm_topk_prob
  float scaling_factor = 1.0f;  // routed_scaling_factor
  TensorView ids;      // [num_tokens, top_k] i32, by falling choice score; ties: lowest index
  TensorView weights;  // [num_tokens, top_k] f32
};

struct ExpertWeights {
  Weight gate, up, down;  // [Im, D], [Im, D], [D, Im]
};

// out[t] += sum_k weights[t, k] * Expert_{ids[t, k]}(x[t])   (summed in order of k)
struct MoeFfnArgs {
  TensorView x;                               // [num_tokens, D] f32
  TensorView ids;                             // [num_tokens, top_k] i32
  TensorView weights;                         // [num_tokens, top_k] f32
  const std::vector<ExpertWeights>* experts;  // [E]
  TensorView out;                             // [num_tokens, D] f32, accumulated into
};

// Naive (non-absorbed) causal attention of a chunk of queries over all keys so far. Key tiles of 64
// are anchored at position 0 and visited in order, so a row's bits do not depend on the chunk it
// came in.
struct MlaPrefillArgs {
  TensorView q;       // [num_tokens, heads, nope + rope] f32, query t at position query_begin + t
  TensorView k_nope;  // [num_keys, heads, nope] f32
  TensorView k_rope;  // [num_keys, rope] f32, shared by all heads
  TensorView v;       // [num_keys, heads, v_dim] f32
  std::int64_t query_begin = 0;
  float softmax_scale = 0;
  TensorView out;  // [num_tokens, heads, v_dim] f32
};

// out[t, :] = table[ids[t], :]
struct EmbedArgs {
  TensorView table;  // [vocab, D] f32 or bf16
  TensorView ids;    // [num_tokens] i32
  TensorView out;    // [num_tokens, D] f32
};

// out = x, row by row, rounded where out is bf16.
struct CopyRowsArgs {
  TensorView x;    // [num_rows, width] f32
  TensorView out;  // [num_rows, width] f32 or bf16
};

class OpSet {
 public:
  virtual ~OpSet() = default;
  virtual const char* name() const = 0;

  // Where every tensor of an operation's arguments must lie. Fronts cannot check the contents of
  // tensors that the host cannot read: who makes indices for such a backend must know them to be
  // in range.
  virtual Memory& memory() { return host_memory(); }

  // Between the two, calls of mla_decode with the same cache_seqlens tensor find the same lengths
  // in it: what follows from lengths alone need be made once, not once per layer.
  virtual void begin_step() {}
  virtual void end_step() noexcept {}

  virtual void quantize_q(const QuantizeQArgs& args) = 0;
  virtual void append_kv(const AppendKvArgs& args) = 0;
  virtual void fetch_dequant(const FetchDequantArgs& args) = 0;
  // One row after the other in memory that the host can read, unless a backend knows better.
  virtual void round_latents(const RoundLatentsArgs& args);
  virtual void mla_decode(const MlaDecodeArgs& args) = 0;
  virtual void mla_prefill(const MlaPrefillArgs& args) = 0;

  virtual void embed(const EmbedArgs& args) = 0;
  virtual void linear(const LinearArgs& args) = 0;
  virtual void head_linear(const HeadLinearArgs& args) = 0;
  virtual void rms_norm(const RmsNormArgs& args) = 0;
  virtual void rope(const RopeArgs& args) = 0;
  virtual void swiglu(const SwigluArgs& args) = 0;
  virtual void copy_rows(const CopyRowsArgs& args) = 0;
  virtual void add(const TensorView& x, const TensorView& y) = 0;  // y += x, [n, width] f32
  virtual void moe_route(const MoeRouteArgs& args) = 0;
  virtual void moe_ffn(const MoeFfnArgs& args) = 0;

  // For study only (ops/study.h); kUnsupported on a backend that has none.
  virtual void study_append(const StudyAppendArgs& args);
  virtual void study_decode(const StudyDecodeArgs& args);
};

// One step of a model: begin_step to end_step, whatever is thrown between.
class StepScope {
 public:
  explicit StepScope(OpSet& ops) : ops_(ops) { ops_.begin_step(); }
  ~StepScope() { ops_.end_step(); }
  StepScope(const StepScope&) = delete;
  StepScope& operator=(const StepScope&) = delete;

 private:
  OpSet& ops_;
};

}  // namespace snapmla::ops
