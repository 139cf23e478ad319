// One CTA computes the whole plan: costs, their prefix sums, and the items in order.
// PTXAS: no-spill
#include <algorithm>
#include <climits>

#include "backends/cuda/launch.h"
#include "backends/cuda/mla_decode/cutting.h"
#include "backends/cuda/mla_decode/plan.h"
#include "backends/cuda/ptx/pdl.h"

namespace snapmla::cuda {
namespace {
constexpr int kPlanThreads = 1024;
constexpr int kMaxParts = 512;
}  // namespace

PlanSizes plan_sizes(const DecodeShape& shape, int num_sms) {
  PlanSizes s{};
  s.rows = shape.heads_q * shape.seqlen_q;
  s.max_tiles = (shape.max_pages * kPageSize + kTileTokens - 1) / kTileTokens;
  const bool fp8 = shape.format == KvCacheFormat::kFp8;
  const RowChoice choice =
      fp8 && !shape.deterministic
          ? row_choice(s.rows, shape.batch, shape.batch * cost_of(static_cast<int>(s.max_tiles)),
                       num_sms)
          : RowChoice::kWidest;
  s.row_width = choice == RowChoice::kNarrow ? kNarrowTile : fp8 ? widest_tile(s.rows) : kRowTile;
  s.row_tiles = (s.rows + s.row_width - 1) / s.row_width;
  // The BF16 kernel computes 64 rows of fewer; they need not be stored.
  s.slot_rows = s.row_tiles == 1 ? widest_tile(s.rows) : s.row_tiles * s.row_width;
  s.parts = std::clamp<std::int64_t>(num_sms / s.row_tiles, 1, kMaxParts);
  s.ctas = s.parts * s.row_tiles;
  if (choice == RowChoice::kPlan) {
    s.narrow_tiles = narrow_tiles(s.rows);
    s.narrow_parts = std::min<std::int64_t>(num_sms, kMaxParts) / s.narrow_tiles;
    s.ctas = std::max(s.ctas, s.narrow_parts * s.narrow_tiles);
  }
  s.part_entries = (s.ctas + s.row_tiles - 1) / s.row_tiles;
  const std::int64_t splits = (s.max_tiles + kTilesPerSplit - 1) / kTilesPerSplit;
  // Balanced: each part boundary adds at most one item to one per request.
  s.max_items =
      shape.deterministic ? shape.batch * std::max<std::int64_t>(1, splits) : shape.batch + s.parts;
  std::int64_t at = 0;
  const auto take = [&at](std::int64_t bytes) {
    const std::int64_t begin = at;
    at += (bytes + 255) / 256 * 256;
    return begin;
  };
  s.part = take(s.part_entries * static_cast<std::int64_t>(sizeof(DecodePart)));
  s.items = take(s.max_items * static_cast<std::int64_t>(sizeof(DecodeItem)));
  s.merges = take(shape.batch * static_cast<std::int64_t>(sizeof(DecodeMerge)));
  s.num_merges = take(4);
  s.narrow = take(4);
  s.arrivals = take(s.max_items * std::max(s.row_tiles, s.narrow_tiles) * 2 * 4);
  s.lse_accum = take(s.max_items * s.rows * 8);
  s.out_accum = take(s.max_items * s.slot_rows * kKvLoraRank * 4);
  s.total = at;
  return s;
}

DecodePlanView plan_view(const PlanSizes& sizes, void* workspace) {
  auto* base = static_cast<std::uint8_t*>(workspace);
  return {reinterpret_cast<DecodePart*>(base + sizes.part),
          reinterpret_cast<DecodeItem*>(base + sizes.items),
          reinterpret_cast<DecodeMerge*>(base + sizes.merges),
          reinterpret_cast<std::int32_t*>(base + sizes.num_merges),
          reinterpret_cast<std::int32_t*>(base + sizes.narrow),
          reinterpret_cast<std::int32_t*>(base + sizes.arrivals),
          reinterpret_cast<float*>(base + sizes.out_accum),
          reinterpret_cast<float*>(base + sizes.lse_accum)};
}

namespace {

struct PlanArgs {
  const std::int32_t* cache_seqlens;
  DecodePlanView view;
  int batch, parts, part_entries, max_tiles, row_width, row_tiles, rows, merge_splits;
  int narrow_parts, narrow_tiles, num_sms;  // narrow_tiles 0: no choice
  bool deterministic;
};

// Three running sums at once over the CTA; returns this thread's exclusive prefix, adds the total
// to `base`.
struct Sums {
  long long cost;
  int items, slots;
};

__device__ Sums exclusive_scan(Sums value, Sums& base, Sums* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Sums sum = value;
  for (int d = 1; d < 32; d *= 2) {
    const long long cost = __shfl_up_sync(~0u, sum.cost, d);
    const int items = __shfl_up_sync(~0u, sum.items, d), slots = __shfl_up_sync(~0u, sum.slots, d);
    if (lane >= d) sum = {sum.cost + cost, sum.items + items, sum.slots + slots};
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  Sums before = base, total = base;
  for (int w = 0; w < kPlanThreads / 32; ++w) {
    if (w < warp) {
      before = {before.cost + scratch[w].cost, before.items + scratch[w].items,
                before.slots + scratch[w].slots};
    }
    total = {total.cost + scratch[w].cost, total.items + scratch[w].items,
             total.slots + scratch[w].slots};
  }
  base = total;
  return {before.cost + sum.cost - value.cost, before.items + sum.items - value.items,
          before.slots + sum.slots - value.slots};
}

// Length of a request; 0 for b past the batch. A table of max_tiles tiles bounds it.
__device__ int length_of(const PlanArgs& a, int b) {
  return b < a.batch ? min(max(0, a.cache_seqlens[b]), a.max_tiles * kTileTokens) : 0;
}

__device__ int tiles_of(int length) { return (length + kTileTokens - 1) / kTileTokens; }

// Cost of the whole batch as whole requests, and how many have a token.
__device__ Sums whole_total(const PlanArgs& a, Sums* scratch) {
  Sums total{0, 0, 0};
  for (int begin = 0; begin < a.batch; begin += kPlanThreads) {
    const int cost = cost_of(tiles_of(length_of(a, begin + static_cast<int>(threadIdx.x))));
    exclusive_scan({cost, cost > 0 ? 1 : 0, 0}, total, scratch);
  }
  return total;
}

// Cost of the whole batch when it is cut by limit.
__device__ long long even_total(const PlanArgs& a, const Cutting& how, Sums* scratch) {
  Sums total{0, 0, 0};
  for (int begin = 0; begin < a.batch; begin += kPlanThreads) {
    const int tiles = tiles_of(length_of(a, begin + static_cast<int>(threadIdx.x)));
    exclusive_scan({pieces_of(how, tiles, 0).cost, 0, 0}, total, scratch);
  }
  return total.cost;
}

// The best limit for one piece a part, a warp per candidate; limit 0: all leave too many pieces, or
// pieces so long (one long request among many short ones) that a stream of `share` is faster.
// `best` is LLONG_MAX before.
__device__ Cutting cut_one_each(const PlanArgs& a, long long total_tiles, long long share,
                                long long* best) {
  const int warp = static_cast<int>(threadIdx.x) >> 5, lane = static_cast<int>(threadIdx.x) & 31;
  static_assert(kPlanThreads / 32 == kCandidates);
  const int limit = max(1, static_cast<int>((total_tiles + a.parts - 1) / a.parts)) + warp;
  int longest = 0, splits = 0, pieces = 0, cuts = 0;
  for (int b = lane; b < a.batch; b += 32) {
    const int tiles = tiles_of(length_of(a, b)), count = (tiles + limit - 1) / limit;
    if (tiles == 0) continue;
    longest = max(longest, (tiles + count - 1) / count);
    splits = max(splits, count);
    pieces = min(pieces + count, kMaxParts + 1);  // of more than 32 requests, too, no overflow
    if (count > 1) cuts = min(cuts + 1, kMaxParts + 1);
  }
  longest = __reduce_max_sync(~0u, longest);
  splits = __reduce_max_sync(~0u, splits);
  pieces = __reduce_add_sync(~0u, pieces);
  cuts = __reduce_add_sync(~0u, cuts);
  if (lane == 0 && pieces <= a.parts) {
    const OneEachCosts costs = one_each_costs(a.row_width, a.rows);
    const long long time = one_each_time(costs, a.parts, longest, splits, pieces, cuts);
    if (time <= stream_time(costs, share))
      atomicMin(best, time << 32 | static_cast<long long>(pieces) << 16 | warp);
  }
  __syncthreads();
  if (*best == LLONG_MAX) return {Cut::kOneEach, 0, 0};
  return {Cut::kOneEach, limit - warp + static_cast<int>(*best & 0xffff), *best >> 16 & 0xffff};
}

// A request that is cut at any place costs its parts a second start and a merge. Where even pieces
// load no part by more than that, they are better; with few requests only few parts would pay it.
// `load` and `most` are zero before and after, `best` is LLONG_MAX before.
__device__ Cutting choose_cutting(const PlanArgs& a, const Sums& total, Sums* scratch, int* load,
                                  int* most, long long* best) {
  const int thread = static_cast<int>(threadIdx.x);
  Cutting stream{Cut::kStream, 0, 0};
  stream.share = share_of(a.parts, total.cost);
  if (stream.share > 1 << 30) return stream;  // nobody has that many
  if (is_few(stream.share, total.items)) {
    const long long tiles = total.cost - static_cast<long long>(total.items) * kItemCost;
    const Cutting one_each = cut_one_each(a, tiles, stream.share, best);
    if (one_each.limit > 0) return one_each;
    if (stream.share < 2 * kCutCost) return stream;
  }
  Cutting even{Cut::kEven, even_limit(stream.share), 0};
  even.share = share_of(a.parts, even_total(a, even, scratch));
  Sums base{0, 0, 0};
  for (int begin = 0; begin < a.batch; begin += kPlanThreads) {
    const int tiles = tiles_of(length_of(a, begin + thread));
    const Pieces pieces = pieces_of(even, tiles, 0);
    const Sums before = exclusive_scan({pieces.cost, 0, 0}, base, scratch);
    for (int i = 0; i < pieces.count; ++i) {
      const Piece piece = piece_at(a.parts, even, pieces, tiles, {before.cost, 0}, i);
      atomicAdd(&load[piece.part], piece.tile_end - piece.tile_begin + kItemCost);
    }
  }
  __syncthreads();
  for (int part = thread; part < kMaxParts; part += kPlanThreads) {
    atomicMax(most, load[part]);
    load[part] = 0;
  }
  __syncthreads();
  return *most <= stream.share + cut_cost(a.parts, total.items) ? even : stream;
}

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(PlanArgs a) {
  __shared__ Sums scratch[kPlanThreads / 32];
  __shared__ int part_end[kMaxParts];
  __shared__ int most;
  __shared__ long long best;
  const int thread = static_cast<int>(threadIdx.x);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  for (int part = thread; part < kMaxParts; part += kPlanThreads) part_end[part] = 0;
  if (thread == 0) {
    *a.view.num_merges = 0;
    most = 0;
    best = LLONG_MAX;
  }
  __syncthreads();
  Cutting how{Cut::kEven, kTilesPerSplit, 0};
  if (a.deterministic) {
    how.share = share_of(a.parts, even_total(a, how, scratch));
  } else {
    const Sums total = whole_total(a, scratch);
    const bool narrow = a.narrow_tiles > 0 && is_narrow(a.rows, total.cost, a.num_sms);
    if (narrow) {
      a.parts = a.narrow_parts;
      a.row_width = kNarrowTile;
      a.row_tiles = a.narrow_tiles;
    }
    if (thread == 0) *a.view.narrow = narrow;
    how = choose_cutting(a, total, scratch, part_end, &most, &best);
  }

  Sums base{0, 0, 0}, cost_base{0, 0, 0};
  for (int begin = 0; begin < a.batch; begin += kPlanThreads) {
    const int b = begin + thread, length = length_of(a, b), tiles = tiles_of(length);
    // In a stream the cost does not depend on how the request is cut, and elsewhere the cut not on
    // the cost before.
    const Sums cost = exclusive_scan(
        {how.cut == Cut::kStream ? cost_of(tiles) : pieces_of(how, tiles, 0).cost, 0, 0}, cost_base,
        scratch);
    const Pieces pieces = pieces_of(how, tiles, cost.cost);
    const Sums at =
        exclusive_scan({0, pieces.count, pieces.count > 1 ? pieces.count : 0}, base, scratch);
    if (b >= a.batch) continue;
    // Merging in the decode kernel pays where other CTAs' work hides it.
    const bool split = pieces.count > 1;
    const bool merge_here = split && pieces.count <= a.merge_splits && how.cut != Cut::kOneEach;
    if (pieces.count == 0 || (split && !merge_here)) {
      a.view.merges[atomicAdd(a.view.num_merges, 1)] =
          DecodeMerge{b, static_cast<std::int32_t>(at.slots), pieces.count, 0};
    }
    for (int i = 0; i < pieces.count; ++i) {
      const Piece piece = piece_at(a.parts, how, pieces, tiles, {cost.cost, at.items}, i);
      const int index = at.items + i;
      DecodeItem item{};
      item.request = b;
      item.tile_begin = piece.tile_begin;
      item.tile_end = piece.tile_end;
      item.length = length;
      item.slot = split ? at.slots + i : -1;
      item.first_slot = split ? at.slots : 0;
      item.splits = split && !merge_here ? kLeftToCombine : pieces.count;
      a.view.items[index] = item;
      atomicMax(&part_end[piece.part], index + 1);
    }
  }
  __syncthreads();
  for (int i = thread; i < base.slots * a.row_tiles * 2; i += kPlanThreads) a.view.arrivals[i] = 0;
  __syncthreads();
  // A part without items ends where the one before it ends: prefix maximum by one warp.
  if (thread < 32) {
    constexpr int kEach = kMaxParts / 32;
    int largest = 0;
    for (int i = 0; i < kEach; ++i)
      largest = part_end[thread * kEach + i] = max(largest, part_end[thread * kEach + i]);
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, largest, d);
      if (thread >= d) largest = max(largest, other);
    }
    const int before = __shfl_up_sync(~0u, largest, 1);
    for (int i = 0; thread > 0 && i < kEach; ++i)
      part_end[thread * kEach + i] = max(part_end[thread * kEach + i], before);
  }
  __syncthreads();
  for (int part = thread; part < a.part_entries; part += kPlanThreads) {
    const int first = part > 0 ? part_end[part - 1] : 0, count = part_end[part] - first;
    DecodePart out{};
    if (count > 0) out.first = a.view.items[first];
    out.begin = first;
    out.count = count;
    a.view.parts[part] = out;
  }
}

}  // namespace

void launch_plan(const DecodeShape& shape, const PlanSizes& sizes, int num_sms,
                 const std::int32_t* cache_seqlens, const DecodePlanView& view,
                 cudaStream_t stream) {
  const PlanArgs args{cache_seqlens,
                      view,
                      static_cast<int>(shape.batch),
                      static_cast<int>(sizes.parts),
                      static_cast<int>(sizes.part_entries),
                      static_cast<int>(sizes.max_tiles),
                      static_cast<int>(sizes.row_width),
                      static_cast<int>(sizes.row_tiles),
                      static_cast<int>(sizes.rows),
                      merge_splits(shape.format),
                      static_cast<int>(sizes.narrow_parts),
                      static_cast<int>(sizes.narrow_tiles),
                      num_sms,
                      shape.deterministic};
  launch("plan_decode", Ordering::kOverlap, plan_kernel, dim3(1), dim3(kPlanThreads), 0, stream,
         args);
}

}  // namespace snapmla::cuda
