// What a decode kernel is given: tensors, the plan, and how rows map to CTAs.
//
//   rows      = seqlen_q * heads_q, row r = token * heads_q + head
//   row tile  = 64 consecutive rows, one CTA each
//   part      = one share of the batch's tokens; its row tiles run in adjacent CTAs, so that the
//               second read of a page comes from L2:  blockIdx.x = part * row_tiles + row_tile
//   item      = (request, [tile_begin, tile_end), slot): consecutive tiles of kTileTokens tokens
//   slot      = -1: the whole request, written to out / lse directly; otherwise the index of a
//               partial result in out_accum / lse_accum, which combine merges
#pragma once

#include <cuda.h>

#include <cstdint>

namespace snapmla::cuda {

inline constexpr int kTileTokens = 128;  // two pages
inline constexpr int kRowTile = 64;

struct alignas(16) DecodeItem {
  std::int32_t request;
  std::int32_t tile_begin, tile_end;  // tiles of kTileTokens tokens, from the request's start
  std::int32_t slot;
};

// Device pointers into the workspace.
struct DecodePlanView {
  std::int32_t* part_begin;   // [parts + 1] first item of each part
  DecodeItem* items;          // [max_items]
  std::int32_t* split_begin;  // [batch] first slot of a request with two or more items
  std::int32_t* split_count;  // [batch] 0: empty request, 1: written directly, n: slots
  std::int32_t* num_merged;   // how many requests combine has to write
  std::int32_t* merged;       // [batch] those requests, in no order: split_count is not 1
  float* out_accum;           // [max_slots, rows, 512] f32, normalised per split
  float* lse_accum;           // [max_slots, rows] f32, base 2
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

  const std::int32_t* block_table;    // [batch, table_stride]
  std::int64_t table_stride;          // elements
  const std::int32_t* cache_seqlens;  // [batch]

  void* out;  // bf16 or f32
  RowStrides out_stride;
  bool out_f32;
  float* lse;  // [batch, heads_q, seqlen_q] natural log; null: not wanted
  std::int64_t lse_batch_stride, lse_head_stride, lse_token_stride;  // elements

  DecodePlanView plan;
  float scale_log2e;  // softmax_scale * log2(e)
  std::int32_t batch, heads_q, seqlen_q, rows, row_tiles, parts;
};

}  // namespace snapmla::cuda
