// The Hopper operations for an engine of your own: raw device pointers, a stream, no allocation and
// no synchronisation in a launch, safe to capture in a CUDA graph.
//
//   bytes = decode_workspace_bytes(shape)                once; keep the memory
//   plan_decode(shape, cache_seqlens, workspace, s)      once per step
//   for each layer: quantize_q, append_kv, mla_decode(args, workspace, s)
//
// Every pointer in the arguments is device memory; shapes and strides are checked on the host
// before the launch (Error kInvalidArgument names the argument), contents of device tensors are
// not. All functions need a Hopper GPU (compute capability 9.0) and throw kUnsupported with the
// reason elsewhere, or in a build without CUDA.
#pragma once

#include <cstdint>

#include "snapmla/kv_cache.h"
#include "snapmla/kv_rounding.h"
#include "snapmla/mla.h"
#include "snapmla/tensor.h"

namespace snapmla::cuda {

using Stream = void*;  // a cudaStream_t

// Empty string: the current device can run these operations. Otherwise the reason why not.
const char* unavailable_reason() noexcept;

// What the plan depends on besides the lengths. All layers of a step share one plan.
struct DecodeShape {
  std::int64_t batch = 0;
  std::int64_t seqlen_q = 1;  // 1..16
  std::int64_t heads_q = 0;   // 1..128
  // Width of block_table: bounds every cache_seqlens[b]. Unless deterministic, decode of few short
  // requests over an FP8 cache is faster by up to a quarter where the table is no wider than they
  // need, and nearly as fast where it is more than about twice what would still count as short (one
  // request of 64 heads: up to 29k tokens, and from 58k on): in between the kernel expects long
  // ones (docs/design/0007-row-tiles.md).
  std::int64_t max_pages = 0;
  KvCacheFormat format = KvCacheFormat::kFp8;
  // true: a request is split by its own length alone, so that a row's bits do not depend on its
  // batch. false: work is spread evenly over the GPU, which is faster for few or ragged requests.
  bool deterministic = false;

  friend bool operator==(const DecodeShape&, const DecodeShape&) = default;
};

// Device memory, aligned to 256 bytes. One workspace serves one stream at a time.
struct Workspace {
  void* data = nullptr;
  std::int64_t bytes = 0;
};

// Bytes of workspace that plan_decode and mla_decode need for any lengths up to shape.max_pages
// pages.
std::int64_t decode_workspace_bytes(const DecodeShape& shape);

// Distributes the pages of the batch over the GPU; runs on the device, reads cache_seqlens [batch]
// i32 there, so that a captured graph follows lengths that change between replays.
void plan_decode(const DecodeShape& shape, const TensorView& cache_seqlens,
                 const Workspace& workspace, Stream stream);

// Decode with the plan in `workspace`, which must have been made for the same shape and lengths:
// the plan holds the lengths, args.cache_seqlens is not read again. A plan serves any number of
// calls. args.num_splits is ignored: the plan decides. FP8 cache: pages of PageImage::kSwizzled128,
// or kPlainRows with 16-byte aligned planes and strides. out: bf16 or f32.
void mla_decode(const MlaDecodeArgs& args, const DecodeShape& shape, const Workspace& workspace,
                Stream stream);

// RoPE on the way: the 64 rope elements are rotated in f32 before they are quantised, pair
// (2j, 2j + 1) by row `position` of the table. Empty views: nothing is rotated.
struct RotaryFusion {
  TensorView positions;  // [num_tokens] i32 (append_kv), [batch, seqlen_q] i32 (quantize_q)
  TensorView cos_sin;    // [max_position, 64] f32: cos_0, sin_0, cos_1, sin_1, ...
};

// RMSNorm of the latent on the way: w * x / sqrt(mean(x^2) + eps) in f32. Empty: none.
struct NormFusion {
  TensorView weight;  // [512] f32 or bf16
  float eps = 1e-6f;
};

// One pass over the rows, the bits of the reference backend. Rows must begin at multiples of 16
// bytes (latent) and of two elements (rope).
void quantize_q(const QuantizeQArgs& args, Stream stream, const RotaryFusion& rotary = {});
void append_kv(const AppendKvArgs& args, Stream stream, const RotaryFusion& rotary = {},
               const NormFusion& norm = {});
void fetch_dequant(const FetchDequantArgs& args, Stream stream);

// Rounds new latents in place (kv_rounding.h), between the model's own RMSNorm and RoPE and
// append_kv, which then is given neither. feedback: on the device, of make_latent_feedback,
// complete when this is called: it is read before earlier work in the stream has ended. Its order
// must be a permutation of 0..511; the host cannot check that here.
void round_latents(const RoundLatentsArgs& args, Stream stream);

}  // namespace snapmla::cuda
