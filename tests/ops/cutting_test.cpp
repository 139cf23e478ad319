// How the device's plan cuts requests (the arithmetic; tests/cuda runs the kernel): every tile is
// in one piece, pieces and parts are in order, and loads and counts keep their bounds.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <tuple>
#include <vector>

#include "backends/cuda/mla_decode/cutting.h"

namespace snapmla::cuda {
namespace {

struct Plan {
  std::vector<long long> load;
  long long items = 0;
};

// Follows the plan kernel: requests in order, costs before each, pieces to parts.
Plan cut(const std::vector<int>& tiles, const Cutting& how, int parts) {
  Plan plan{std::vector<long long>(static_cast<std::size_t>(parts)), 0};
  Before before{0, 0};
  int last_part = 0;
  for (const int n : tiles) {
    const Pieces pieces = pieces_of(how, n, before.cost);
    EXPECT_EQ(pieces.count == 0, n == 0);
    int covered = 0;
    for (int i = 0; i < pieces.count; ++i) {
      const Piece piece = piece_at(parts, how, pieces, n, before, i);
      EXPECT_EQ(piece.tile_begin, covered);
      EXPECT_GT(piece.tile_end, piece.tile_begin);
      EXPECT_GE(piece.part, last_part);
      EXPECT_LT(piece.part, parts);
      if (how.cut != Cut::kStream) {
        EXPECT_LE(piece.tile_end - piece.tile_begin, how.limit);
      }
      plan.load[static_cast<std::size_t>(std::clamp(piece.part, 0, parts - 1))] +=
          piece.tile_end - piece.tile_begin + kItemCost;
      covered = piece.tile_end;
      last_part = piece.part;
      ++plan.items;
    }
    EXPECT_EQ(covered, n);
    before.cost += pieces.cost;
    before.pieces += pieces.count;
  }
  return plan;
}

long long total_cost(const std::vector<int>& tiles, const Cutting* even) {
  long long total = 0;
  for (const int n : tiles) total += even ? pieces_of(*even, n, 0).cost : cost_of(n);
  return total;
}

std::vector<std::vector<int>> batches() {
  std::mt19937 rng(20260218);
  std::vector<std::vector<int>> list = {{0}, {1}, {1024}, {0, 0, 5}, std::vector<int>(128, 64)};
  for (int batch : {2, 7, 33, 128, 500}) {
    for (int spread : {1, 4, 1000}) {
      std::vector<int> tiles;
      for (int b = 0; b < batch; ++b)
        tiles.push_back(rng() % 9 == 0 ? 0 : 1 + static_cast<int>(rng() % (3u * spread)));
      list.push_back(tiles);
    }
  }
  return list;
}

TEST(Cutting, StreamSharesAreEven) {
  for (const std::vector<int>& tiles : batches()) {
    for (int parts : {1, 4, 33, 66, 132}) {
      const Cutting how{Cut::kStream, 0, share_of(parts, total_cost(tiles, nullptr))};
      const Plan plan = cut(tiles, how, parts);
      // A piece's start costs kItemCost again where a request is cut.
      const auto requests = static_cast<long long>(
          std::count_if(tiles.begin(), tiles.end(), [](int n) { return n > 0; }));
      EXPECT_LE(plan.items, requests + parts - 1);
      EXPECT_LE(*std::max_element(plan.load.begin(), plan.load.end()), how.share + 2 * kItemCost);
    }
  }
}

TEST(Cutting, EvenPiecesKeepTheBoundsOfTheWorkspace) {
  for (const std::vector<int>& tiles : batches()) {
    for (int parts : {1, 4, 33, 66, 132}) {
      const long long stream_share = share_of(parts, total_cost(tiles, nullptr));
      Cutting how{Cut::kEven, even_limit(stream_share), 0};
      how.share = share_of(parts, total_cost(tiles, &how));
      const Plan plan = cut(tiles, how, parts);
      // The workspace holds one item per request and one per part.
      EXPECT_LE(plan.items, static_cast<long long>(tiles.size()) + parts);
    }
  }
}

// What variant 21 of docs/notes/fp8-decode-hopper.md is about: 128 requests of 64 tiles.
TEST(Cutting, UniformBatchesAreNotCut) {
  const std::vector<int> tiles(128, 64);
  for (int parts : {66, 132}) {
    const long long stream_share = share_of(parts, total_cost(tiles, nullptr));
    Cutting how{Cut::kEven, even_limit(stream_share), 0};
    how.share = share_of(parts, total_cost(tiles, &how));
    const Plan plan = cut(tiles, how, parts);
    EXPECT_EQ(plan.items, 128);
    EXPECT_LE(*std::max_element(plan.load.begin(), plan.load.end()),
              stream_share + cut_cost(parts, 128));
  }
}

TEST(Cutting, OnePieceAPartSpreadsThem) {
  for (const std::vector<int>& tiles : batches()) {
    for (int parts : {1, 4, 33, 66, 132}) {
      for (int limit : {1, 2, 5, 40}) {
        Cutting how{Cut::kOneEach, limit, 0};
        for (const int n : tiles) how.share += pieces_of(how, n, 0).count;
        if (how.share == 0 || how.share > parts) continue;  // the plan does not take it
        const Plan plan = cut(tiles, how, parts);
        EXPECT_EQ(plan.items, how.share);
        int busy = 0, gap = 0, longest_gap = 0;
        for (const long long load : plan.load) {
          if (load > 0) {
            ++busy;
            EXPECT_LE(load, limit + kItemCost) << "two pieces in one part";
          }
          gap = load > 0 ? 0 : gap + 1;
          longest_gap = std::max(longest_gap, gap);
        }
        EXPECT_EQ(busy, how.share);
        EXPECT_LE(longest_gap, parts / how.share);
      }
    }
  }
}

// The choices that the sweeps of variants 26 and 41 found best.
TEST(Cutting, OnePieceAPartLeavesSmsFreeWhereThatIsFaster) {
  const auto best = [](int rows, int requests, int tiles, int width = 0) {
    const OneEachCosts costs = one_each_costs(width > 0 ? width : widest_tile(rows), rows);
    const int parts = 132 / ((rows + 63) / 64);
    std::pair<int, int> best{1 << 30, 0};
    for (int i = 0; i < kCandidates; ++i) {
      const int limit = std::max(1, (requests * tiles + parts - 1) / parts) + i;
      const int count = (tiles + limit - 1) / limit;
      if (requests * count > parts) continue;
      const int pieces = requests * count;
      best = std::min(best, {one_each_time(costs, parts, (tiles + count - 1) / count, count, pieces,
                                           count > 1 ? requests : 0),
                             limit});
    }
    return best.second;
  };
  constexpr int kWhole = 5;
  EXPECT_EQ(best(128, 13, 5), 1);
  EXPECT_EQ(best(128, 17, 5), 2);
  EXPECT_GE(best(128, 20, 5), kWhole);  // in three 20.6 us, whole 19.9
  EXPECT_GE(best(128, 32, 5), kWhole);
  EXPECT_EQ(best(64, 20, 5), 1);
  EXPECT_EQ(best(64, 24, 5), 2);
  EXPECT_EQ(best(64, 32, 5), 2);
  EXPECT_GE(best(64, 40, 5), kWhole);
  EXPECT_GE(best(64, 60, 5), kWhole);
  EXPECT_EQ(best(32, 45, 5), 3);
  EXPECT_GE(best(32, 60, 5), kWhole);
  EXPECT_EQ(best(16, 60, 5), 3);
  EXPECT_EQ(best(256, 8, 5), 2);
  EXPECT_GE(best(256, 12, 5), kWhole);
  EXPECT_EQ(best(128, 1, 64), 2);     // 1 x 8,192: 32 pairs of SMs instead of 64
  EXPECT_EQ(best(128, 1, 5), 1);      // 1 x 640
  EXPECT_EQ(best(128, 16, 5), 2);     // 16 x 640
  EXPECT_EQ(best(128, 1, 1024), 16);  // 1 x 131,072
  EXPECT_EQ(best(64, 1, 64), 1);
  EXPECT_EQ(best(16, 1, 64), 1);  // by one tile 8.7 us, by two 9.9 (variant 74)
  EXPECT_EQ(best(16, 4, 64), 2);
  EXPECT_EQ(best(16, 16, 16), 2);
  // The BF16 kernel, always 64 rows a CTA: 16 heads, 1 x 8,192, 15.6 us by two tiles, 14.4 by one.
  EXPECT_EQ(best(16, 1, 64, 64), 1);
  EXPECT_EQ(best(16, 1, 1024, 64), 8);
}

// Where one request is long and many are short, one piece a part would make the pieces of the long
// one long.
TEST(Cutting, OneLongRequestAmongShortOnesIsAStream) {
  for (const auto& [rows, parts, short_ones, tiles] :
       {std::tuple{128, 66, 50, 500}, std::tuple{16, 132, 100, 1000}}) {
    const OneEachCosts costs = one_each_costs(widest_tile(rows), rows);
    const long long share = share_of(parts, short_ones * cost_of(1) + cost_of(tiles));
    ASSERT_TRUE(is_few(share, short_ones + 1));
    for (int limit = 1; limit <= tiles; ++limit) {
      const int count = (tiles + limit - 1) / limit;
      if (short_ones + count > parts) continue;
      EXPECT_GT(one_each_time(costs, parts, (tiles + count - 1) / count, count, short_ones + count,
                              count > 1 ? 1 : 0),
                stream_time(costs, share));
    }
  }
  // Batches of equal requests are not.
  EXPECT_LT(one_each_time(one_each_costs(64, 128), 66, 8, 8, 64, 8),
            stream_time(one_each_costs(64, 128), 8));
  EXPECT_LT(one_each_time(one_each_costs(64, 128), 66, 2, 3, 48, 16),
            stream_time(one_each_costs(64, 128), 2));
  EXPECT_LT(one_each_time(one_each_costs(16, 16), 132, 4, 16, 128, 8),
            stream_time(one_each_costs(16, 16), 4));
  // Where even pieces would leave many SMs idle, they are: 17 x 5,120 at 128 rows 43.5 us as a
  // stream, 47.5 in three each; 34 x 5,120 at 64 rows 46.4 and 49.3.
  EXPECT_GT(one_each_time(one_each_costs(64, 128), 66, 14, 3, 51, 17),
            stream_time(one_each_costs(64, 128), share_of(66, 17 * cost_of(40))));
  EXPECT_GT(one_each_time(one_each_costs(64, 64), 132, 14, 3, 102, 34),
            stream_time(one_each_costs(64, 64), share_of(132, 34 * cost_of(40))));
}

// The better width of the sweep of variant 46, where they differ by more than 3%.
TEST(Cutting, FewTilesAreComputedBySixteenRows) {
  const auto width = [](int rows, int requests, int tokens) {
    const bool narrow =
        may_be_narrow(rows, requests, 132) &&
        is_narrow(rows, std::int64_t{requests} * cost_of((tokens + 127) / 128), 132);
    return narrow ? kNarrowTile : widest_tile(rows);
  };
  for (const auto& [rows, requests, tokens] : {std::tuple{64, 1, 640},
                                               {64, 1, 8192},
                                               {64, 2, 8192},
                                               {64, 16, 640},
                                               {64, 32, 640},
                                               {64, 8, 2048},
                                               {64, 32, 128},
                                               {128, 1, 640},
                                               {128, 1, 8192},
                                               {128, 4, 2048},
                                               {128, 16, 640},
                                               {128, 16, 128},
                                               {32, 1, 8192},
                                               {32, 4, 8192},
                                               {32, 16, 640},
                                               {256, 1, 640}}) {
    EXPECT_EQ(width(rows, requests, tokens), 16) << rows << " " << requests << " " << tokens;
  }
  for (const auto& [rows, requests, tokens] : {std::tuple{64, 4, 8192},
                                               {64, 16, 2048},
                                               {64, 2, 32768},
                                               {128, 2, 8192},
                                               {128, 8, 2048},
                                               {128, 32, 640},
                                               {128, 32, 128},
                                               {128, 1, 32768},
                                               {256, 1, 8192},
                                               {256, 8, 2048},
                                               {128, 128, 8192}}) {
    EXPECT_EQ(width(rows, requests, tokens), 64) << rows << " " << requests << " " << tokens;
  }
  EXPECT_EQ(width(32, 128, 8192), 32);
  EXPECT_EQ(width(16, 128, 8192), 16);
}

// Tables that hold few tiles, about as many as the bound, and many: 128k tokens for a request.
TEST(Cutting, WideTablesLeaveTheRowsToThePlan) {
  const auto choice = [](int rows, int requests, int tokens) {
    return row_choice(rows, requests, std::int64_t{requests} * cost_of((tokens + 127) / 128), 132);
  };
  for (const auto& [rows, requests, tokens] :
       {std::tuple{64, 1, 8192}, {64, 33, 640}, {128, 16, 640}})
    EXPECT_EQ(choice(rows, requests, tokens), RowChoice::kNarrow) << rows << " " << requests;
  for (const auto& [rows, requests, tokens] :
       {std::tuple{64, 4, 8192}, {32, 8, 8192}, {128, 1, 16384}, {64, 34, 131072}, {16, 1, 131072}})
    EXPECT_EQ(choice(rows, requests, tokens), RowChoice::kWidest) << rows << " " << requests;
  for (const auto& [rows, requests, tokens] : {std::tuple{64, 1, 131072},
                                               {128, 1, 131072},
                                               {128, 16, 131072},
                                               {32, 1, 131072},
                                               {64, 8, 8192}})
    EXPECT_EQ(choice(rows, requests, tokens), RowChoice::kPlan) << rows << " " << requests;
}

// A grid that is no multiple of its cluster is not launched at all.
TEST(Cutting, ClustersFillTheGrid) {
  int odd = 0;
  for (const int sms : {132, 114, 78, 7}) {
    for (int row_tiles = 1; row_tiles <= 128; ++row_tiles) {
      const int parts = std::max(1, sms / row_tiles), grid = parts * row_tiles;
      const auto size = static_cast<int>(cluster_size(grid, row_tiles));
      EXPECT_EQ(grid % size, 0) << parts << " parts, " << row_tiles << " row tiles";
      EXPECT_EQ(size == 2, row_tiles > 1 && grid % 2 == 0);
      odd += row_tiles > 1 && size == 1;
    }
  }
  EXPECT_GT(odd, 0);
}

TEST(Cutting, FewRequestsSaveLittle) {
  EXPECT_EQ(cut_cost(66, 128), kCutCost);
  EXPECT_EQ(cut_cost(66, 8), 2);
  EXPECT_EQ(cut_cost(132, 32), 3);
  EXPECT_EQ(cut_cost(132, 1 << 30), kCutCost);
  EXPECT_EQ(cut_cost(132, 0), 0);
}

}  // namespace
}  // namespace snapmla::cuda
