// What a decode kernel is given: tensors, the plan, and how rows map to CTAs.
//
//   rows      = seqlen_q * heads_q, row r = token * heads_q + head
//   row tile  = row_width consecutive rows, one CTA each; BF16: 64, FP8: 16, 32 or 64 (plan.h);
//               in a narrow plan 16, whatever row_width is
//   part      = one share of the batch's tokens; its row tiles run in adjacent CTAs, two to a
//               cluster (cluster_size in cutting.h):  blockIdx.x = part * row_tiles + row_tile
//   item      = (request, [tile_begin, tile_end), slot): consecutive tiles of kTileTokens tokens
//   slot      = -1: the whole request, written to out / lse directly; otherwise the index of a
//               partial result in out_accum / lse_accum. Some are merged by the CTA that comes
//               last, the others by combine
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace snapmla::cuda {

inline constexpr int kTileTokens = 128;  // two pages
inline constexpr int kRowTile = 64;      // rows of a CTA, at most
inline constexpr int kMergeSplits = 3;   // most partial results that the FP8 kernel merges itself
inline constexpr int kLeftToCombine = kMergeSplits + 1;

// All that a kernel has to know of an item, so that one load tells it.
struct alignas(16) DecodeItem {
  std::int32_t request;
  std::int32_t tile_begin, tile_end;  // tiles of kTileTokens tokens, from the request's start
  std::int32_t length;                // of the request, when the plan was made
  std::int32_t slot;
  std::int32_t first_slot;  // of the request; 0 where slot is -1
  std::int32_t splits;      // that the decode kernel merges, kLeftToCombine, or 1 where slot is -1
  std::int32_t reserved;
};

// Its first item stands here once more: nobody waits for an index before the first item.
struct alignas(16) DecodePart {
  DecodeItem first;
  std::int32_t begin, count;  // items
};

// What combine has to write.
struct alignas(16) DecodeMerge {
  std::int32_t request, first_slot, splits;  // no splits: an empty request
  std::int32_t reserved;
};

// Device pointers into the workspace.
struct DecodePlanView {
  DecodePart* parts;         // [part_entries], without items past the last part
  DecodeItem* items;         // [max_items]
  DecodeMerge* merges;       // [batch] what is left to combine, in no order
  std::int32_t* num_merges;  // how many
  std::int32_t* narrow;      // 1: 16 rows a CTA; read where the shape leaves that to the plan
  std::int32_t* arrivals;    // [max_slots, row tiles, 2] of a request's first slot, by half of the
                             // output dims: how many partial results are there; 0 between launches
  // Partial results. BF16: O / l and lse (base 2). FP8: O, as fragments.h says, and (R, l).
  float* out_accum;  // [max_slots, slot_rows, 512] f32
  float* lse_accum;  // [max_slots, rows] f32, FP8: [max_slots, rows, 2]
};

// Strides in bytes; a row r lies at token r / heads_q, head r % heads_q.
struct RowStrides {
  std::int64_t batch, token, head;
};

struct DecodeParams {
  // Pages of plain rows only: boxes of 128 bytes x 64 tokens that the copy engine swizzles.
  CUtensorMap latent_map, rope_map;  // [num_pages, 64, row bytes] u8
  bool plain_rows;

  const std::uint8_t* q_latent;  // e4m3 (FP8 cache) or bf16
  const std::uint8_t* q_rope;    // bf16
  const float* q_scale;          // null unless FP8
  RowStrides q_latent_stride, q_rope_stride, q_scale_stride;

  const std::uint8_t* kv_latent;
  const std::uint8_t* kv_rope;
  const std::uint8_t* kv_scale;  // null unless FP8
  std::int64_t latent_page_stride, rope_page_stride, scale_page_stride;

  const std::int32_t* block_table;  // [batch, table_stride]
  std::int64_t table_stride;        // elements

  void* out;  // bf16 or f32
  RowStrides out_stride;
  bool out_f32;
  float* lse;  // [batch, heads_q, seqlen_q] natural log; null: not wanted
  std::int64_t lse_batch_stride, lse_head_stride, lse_token_stride;  // elements

  DecodePlanView plan;
  float scale_log2e;  // softmax_scale * log2(e)
  std::int32_t batch, heads_q, seqlen_q, rows, parts;
  std::int32_t ctas;
  std::int32_t row_width, row_tiles;  // rows of a CTA; CTAs that share a part
  std::int32_t narrow_tiles;  // CTAs that share a part of a narrow plan; 0: it cannot be one
  std::int32_t slot_rows;     // rows of a partial result: `rows` up to 16, 32 or whole tiles
  std::int32_t max_tiles;     // of a request, by the width of block_table
  bool deterministic;         // the order of sums must not depend on the batch
};

// Items of one part in the order of work. The last item, which the next part may share, comes
// second: what has to be merged is then merged early and under other CTAs' work, not when all end.
// Addresses come from the parameters each time: some warps have few registers.
struct PartItems {
  int part, begin, count;
  __device__ const DecodeItem* at(const DecodePlanView& plan, int n) const {
    if (n == 0) return &plan.parts[part].first;
    return plan.items + (n == 1 ? begin + count - 1 : begin + n - 1);
  }
};

// Token and head of a row, stepped without the long way through a division.
struct RowPlace {
  int token, head;
  __device__ RowPlace(int row, int heads_q) : token(row / heads_q), head(row - token * heads_q) {}
  __device__ void advance(int rows, int heads_q) {
    for (head += rows; head >= heads_q; head -= heads_q) ++token;
  }
};

}  // namespace snapmla::cuda
