// Where the plan cuts requests and rows, as arithmetic on tiles: device code, tested on the host
// (tests/ops/cutting_test.cpp). See plan.h.
#pragma once

#include "numeric/hd.h"

namespace snapmla::cuda {

inline constexpr int kItemCost = 2;  // tiles that starting and ending an item cost, about
inline constexpr int kCutCost = 6;   // tiles that cutting a request costs the parts it lies in

SNAPMLA_HD int cost_of(int tiles) { return tiles > 0 ? tiles + kItemCost : 0; }

SNAPMLA_HD long long share_of(int parts, long long total_cost) {
  const long long share = (total_cost + parts - 1) / parts;
  return share > 1 ? share : 1;
}

// Stream: at every multiple of `share` of the batch's cost, wherever that falls. Even and one each:
// a request of more than `limit` tiles into equal pieces no longer than that, shorter ones not at
// all. Even: a piece goes to the part in which it begins. One each: every piece has its own part,
// and parts without one lie between them, so that neighbouring SMs do not all work or all wait.
enum class Cut : signed char { kStream, kEven, kOneEach };

struct Cutting {
  Cut cut;
  int limit;        // even, one each
  long long share;  // cost per part: stream, even; pieces in all: one each
};

// What lies before a request: the cost of the pieces, and their number.
struct Before {
  long long cost;
  int pieces;
};

// Limit of an even cut that may load a part by kCutCost more than `share`.
SNAPMLA_HD int even_limit(long long share) {
  return static_cast<int>(share) + kCutCost - kItemCost;
}

// What parts pay for cuts in a stream, on average and rounded up: with few requests, few have any.
// PERF: rounded down, 32 requests of 32,768 tokens at 64 rows went into a stream: 184.5 us, evenly
// 182.5.
SNAPMLA_HD int cut_cost(int parts, int requests) {
  const long long each = (2ll * kCutCost * requests + parts - 1) / parts;
  return each < kCutCost ? static_cast<int>(each) : kCutCost;
}

struct Pieces {
  int count, cost;  // cost of all of them
  int first_part;   // stream
  long long start;  // stream: position of the first tile
};

SNAPMLA_HD Pieces pieces_of(const Cutting& how, int tiles, long long cost_before) {
  if (tiles == 0) return {0, 0, 0, 0};
  if (how.cut != Cut::kStream) {
    const int count = (tiles + how.limit - 1) / how.limit;
    return {count, tiles + count * kItemCost, 0, 0};
  }
  const long long start = cost_before + kItemCost;
  const int first = static_cast<int>(start / how.share);
  const int last = static_cast<int>((start + tiles - 1) / how.share);
  return {last - first + 1, cost_of(tiles), first, start};
}

struct Piece {
  int part, tile_begin, tile_end;
};

SNAPMLA_HD Piece piece_at(int parts, const Cutting& how, const Pieces& pieces, int tiles,
                          const Before& before, int i) {
  if (how.cut != Cut::kStream) {
    const int even = tiles / pieces.count, longer = tiles % pieces.count;
    const int begin = i * even + (i < longer ? i : longer), end = begin + even + (i < longer);
    if (how.cut == Cut::kOneEach) {
      const long long place = static_cast<long long>(before.pieces + i) * parts / how.share;
      return {static_cast<int>(place), begin, end};
    }
    const long long start = before.cost + begin + static_cast<long long>(i) * kItemCost;
    const long long part = start / how.share;
    return {static_cast<int>(part < parts ? part : parts - 1), begin, end};
  }
  const int part = pieces.first_part + i;
  const auto cut = [&](long long boundary) {
    const long long at = boundary * how.share - pieces.start;
    return static_cast<int>(at < 0 ? 0 : at < tiles ? at : tiles);
  };
  return {part, cut(part), cut(part + 1)};
}

// Rows of a CTA of the FP8 kernel: as many as there are, up to 64.
SNAPMLA_HD int widest_tile(long long rows) { return rows <= 16 ? 16 : rows <= 32 ? 32 : 64; }

inline constexpr int kNarrowTile = 16;
SNAPMLA_HD long long narrow_tiles(long long rows) { return (rows + kNarrowTile - 1) / kNarrowTile; }

// Whether the plan may give a CTA fewer rows than that: each request gets SMs of its own.
SNAPMLA_HD bool may_be_narrow(long long rows, long long requests, int sms) {
  return rows > kNarrowTile && requests * narrow_tiles(rows) <= sms;
}

// Whether it does, for requests whose tiles and starts cost `cost` in all: the SMs have little to
// do. Each page is then read by more CTAs, but a tile's scores, softmax and PV take about half as
// long. From a sweep on an H200 (docs/notes/fp8-decode-hopper.md, variant 46).
SNAPMLA_HD bool is_narrow(long long rows, long long cost, int sms) {
  constexpr long long kBusy = 7;  // tiles and starts per SM from which it does not pay
  return cost * narrow_tiles(rows) <= kBusy * sms;
}

// How many rows a CTA computes: as many as there are, up to 64; 16; or what the plan says of the
// batch's lengths. `most`: the cost if all requests are as long as the block table is wide. PERF: a
// kernel that can do both is up to 1.5% slower than the one for 64 or 32 rows where a batch fills
// its tables, so that it must have something to win: tables for kLoose times as many tiles
// (docs/design/0007-row-tiles.md).
enum class RowChoice : signed char { kWidest, kNarrow, kPlan };

SNAPMLA_HD RowChoice row_choice(long long rows, long long requests, long long most, int sms) {
  constexpr long long kLoose = 2;
  if (!may_be_narrow(rows, requests, sms)) return RowChoice::kWidest;
  if (is_narrow(rows, most, sms)) return RowChoice::kNarrow;
  return is_narrow(rows, (most + kLoose - 1) / kLoose, sms) ? RowChoice::kWidest : RowChoice::kPlan;
}

// CTAs of a cluster, of `ctas` in all. PERF: two row tiles of a part read the same pages; on the
// two SMs of one TPC, where a cluster puts them, their requests become one before they reach L2 (L1
// request coalescer). 128 rows: 43 -> 23 million sectors read from L2 (21 if all met), 334 -> 320
// us, sustained 381 -> 365 (power); BF16 475 -> 448 and 550 -> 514. Nothing else makes use of the
// cluster. Of an odd number of tiles, one in two parts has its neighbour in another part.
SNAPMLA_HD unsigned cluster_size(int ctas, int row_tiles) {
  return row_tiles > 1 && ctas % 2 == 0 ? 2 : 1;
}

// What one piece a part costs, in hundredths of a microsecond: a tile, a split in combine, a
// request that is cut (its partial results, written and read), and, from 33 rows on, all SMs at
// work at once: with half of them, of each pair of SMs one, a tile's keys arrive sooner. From
// sweeps on an H200 (docs/notes/fp8-decode-hopper.md, variants 26, 41 and 74).
struct OneEachCosts {
  int tile, split, cut, crowd;
};

// `width`: rows of a CTA; the BF16 kernel computes 64 however few there are.
SNAPMLA_HD OneEachCosts one_each_costs(int width, int rows) {
  const int cut = rows <= 16 ? 2 : rows <= 32 ? 4 : rows <= 64 ? 14 : rows / 4;
  if (width <= 32) return {120, 2, cut, 0};
  return {220, 2, cut, rows <= 64 ? 350 : 200};
}

inline constexpr int kCandidates = 32;  // limits that are compared

// Time of `pieces` pieces of up to `longest` tiles, at most `splits` of one request; `cuts`
// requests have more than one.
SNAPMLA_HD int one_each_time(const OneEachCosts& costs, int parts, int longest, int splits,
                             int pieces, int cuts) {
  const int crowded = 2 * pieces - parts;
  return longest * costs.tile + splits * costs.split + cuts * costs.cut +
         (crowded > 0 ? costs.crowd * crowded / parts : 0);
}

// The same for a stream whose parts pay `share`: any of them may start an item twice and merge.
SNAPMLA_HD long long stream_time(const OneEachCosts& costs, long long share) {
  constexpr int kMerge = 700;
  return (share + kItemCost) * costs.tile + kMerge;
}

// Whether one piece a part is worth a try: up to about ten tiles a part, or so few requests that
// even pieces load all parts alike.
SNAPMLA_HD bool is_few(long long share, int requests) {
  return share < 2 * kCutCost || (requests <= 2 && share < 1 << 20);
}

}  // namespace snapmla::cuda
