// Where the plan cuts requests, as arithmetic on tiles: device code, tested on the host
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

// Stream: at every multiple of `share` of the batch's cost, wherever that falls. Even: a request of
// more than `limit` tiles into equal pieces no longer than that, shorter ones not at all; a piece
// goes to the part in which it begins.
struct Cutting {
  bool stream;
  int limit;        // even
  long long share;  // cost per part
};

// Limit of an even cut that may load a part by kCutCost more than `share`.
SNAPMLA_HD int even_limit(long long share) {
  return static_cast<int>(share) + kCutCost - kItemCost;
}

// What the busiest part pays for cuts in a stream: with few requests, few parts have any.
SNAPMLA_HD int cut_cost(int parts, int requests) {
  return 2ll * requests < parts ? static_cast<int>(kCutCost * 2ll * requests / parts) : kCutCost;
}

struct Pieces {
  int count, cost;  // cost of all of them
  int first_part;   // stream
  long long start;  // stream: position of the first tile
};

SNAPMLA_HD Pieces pieces_of(const Cutting& how, int tiles, long long cost_before) {
  if (tiles == 0) return {0, 0, 0, 0};
  if (!how.stream) {
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
                          long long cost_before, int i) {
  if (!how.stream) {
    const int even = tiles / pieces.count, longer = tiles % pieces.count;
    const int begin = i * even + (i < longer ? i : longer), end = begin + even + (i < longer);
    const long long start = cost_before + begin + static_cast<long long>(i) * kItemCost;
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

}  // namespace snapmla::cuda
