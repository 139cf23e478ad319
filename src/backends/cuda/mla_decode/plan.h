// The split plan on the device, and where it lies in the workspace.
//
// Balanced: the batch's tiles, request after request with kItemCost tiles of overhead each, are cut
// into `parts` equal shares (stream-K), or, where that loads the parts nearly as evenly, each
// request into equal pieces of at most about a share, or, with few tiles, into pieces that each
// have a part of their own (cutting.h). Deterministic: a request of n tiles is cut
// into ceil(n / kTilesPerSplit) equal pieces by its own length alone, and whole pieces are dealt to
// parts in order, so that a row's bits do not depend on what else is in the batch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backends/cuda/mla_decode/decode_params.h"
#include "snapmla/cuda.h"

namespace snapmla::cuda {

inline constexpr int kTilesPerSplit = 32;  // deterministic mode: 4096 tokens

// The FP8 kernel computes up to 64 rows in a CTA. Where there are few requests of few tiles and the
// plan need not be deterministic, it computes 16 (row_choice in cutting.h): always for a shape
// whose block table holds no more tiles than that; where it holds at least twice as many, the plan
// decides, by the batch's tiles, and the grid serves both.
//
// Sizes that follow from a shape and the GPU's number of SMs.
struct PlanSizes {
  std::int64_t rows, max_tiles, max_items, slot_rows;
  std::int64_t row_width, row_tiles, parts;  // rows of a CTA, at most
  std::int64_t narrow_tiles, narrow_parts;   // if the plan decides for 16; 0: it has no choice
  std::int64_t ctas, part_entries;           // parts that the CTAs look up, in either case
  std::int64_t part, items, merges, num_merges, narrow, arrivals, lse_accum, out_accum,
      total;  // offsets
};

// Requests of 2 to so many splits are merged by the decode kernel unless each piece has a part of
// its own; the others by combine.
inline int merge_splits(KvCacheFormat format) {
  return format == KvCacheFormat::kFp8 ? kMergeSplits : 0;
}

PlanSizes plan_sizes(const DecodeShape& shape, int num_sms);
DecodePlanView plan_view(const PlanSizes& sizes, void* workspace);

void launch_plan(const DecodeShape& shape, const PlanSizes& sizes, int num_sms,
                 const std::int32_t* cache_seqlens, const DecodePlanView& view,
                 cudaStream_t stream);

}  // namespace snapmla::cuda
