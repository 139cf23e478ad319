// Decode on the GPU against exact attention in double and against the emulation of its quantised P:
// the table that all backends share, and shapes that only a GPU has the time for.
#include <algorithm>
#include <memory>

#include "agreement/decode_table.h"
#include "cuda/cuda_test.h"
#include "gpu/fill.h"

namespace snapmla::test {
namespace {

// The tensor cores cut the scores to 14 bits, which the emulation here does not: on an H200 the lse
// differed by at most 0.053 (few tokens, wide logits) and 0.011 (30,000 and 131,072 tokens).
constexpr double kFewTokensSlack = 1.5e-2, kFewTokensLse = 8e-2;
constexpr double kManyTokensSlack = 1e-3, kManyTokensLse = 2e-2;

// Case `index` of the shared table, with the GPU's own variations on top. Its F32 cases are BF16
// here; P is accumulated in two levels always.
gpu::ProblemShape table_shape(int index) {
  const agreement::Shape from = agreement::make_shape(index);
  gpu::ProblemShape s;
  s.format = from.format == KvCacheFormat::kFp8 ? KvCacheFormat::kFp8 : KvCacheFormat::kBf16;
  s.image = readable(from.image);
  s.p_block = from.p_block;
  s.heads = from.heads;
  s.seqlen_q = from.seqlen_q;
  s.lengths = from.lengths;
  s.separate_tensors = from.separate;
  s.row_padding = from.padded ? 16 * (1 + index % 4) : 0;
  s.lse = from.lse;
  s.scale_mode = from.scale_mode;
  s.softmax_scale = from.softmax_scale;
  s.out = index % 3 == 0 ? DType::kBF16 : DType::kF32;
  s.deterministic = index % 5 < 2;
  s.unused_pages = 3;
  s.unused_columns = index / 8 % 2 == 0 ? kWideTable : 2;
  if (index / 16 % 12 == 2 && s.heads * s.seqlen_q > 16)
    add_empty_requests(s);  // up to 64 rows a CTA
  s.seed = static_cast<std::uint64_t>(index) + 1;
  return s;
}

void expect_table_case(int index) {
  SCOPED_TRACE("case " + std::to_string(index));
  gpu::Problem problem(table_shape(index), uneven_data(static_cast<std::uint64_t>(index) + 1));
  expect_agreement(problem, {}, kFewTokensSlack, kFewTokensLse);
}

// 120 consecutive cases of the table per test: the fixture's cost is that of one.
class CudaTable : public CudaTest, public ::testing::WithParamInterface<int> {};

TEST_P(CudaTable, AgreesWithFp64) {
  for (int i = 0; i < 120 && !HasFatalFailure(); ++i) expect_table_case(GetParam() * 120 + i);
}
INSTANTIATE_TEST_SUITE_P(Shared, CudaTable, ::testing::Range(0, 25));

class CudaSmallTable : public CudaTest, public ::testing::WithParamInterface<int> {};
TEST_P(CudaSmallTable, AgreesWithFp64) { expect_table_case(GetParam()); }
INSTANTIATE_TEST_SUITE_P(Shared, CudaSmallTable,
                         ::testing::Values(0, 1, 2, 7, 11, 15, 107, 111, 138, 163, 205, 210, 307,
                                           411, 468));

// Two row tiles of 64 rows and eight of 16, in clusters of two, requests in one piece and in
// several; 17 to 32 rows. The widest row tiles; 16 rows a CTA; 16 rows because the plan says so.
class CudaSmallPlan : public CudaTest {};
class CudaSmallTiles : public CudaTest, public ::testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(All, CudaSmallTiles, ::testing::Values(0, 1, 2, 3, 4, 5, 6, 7, 8, 10));
TEST_P(CudaSmallTiles, AgreeWithFp64) {
  const int index = GetParam();
  gpu::ProblemShape s;
  s.format = index % 2 == 0 ? KvCacheFormat::kFp8 : KvCacheFormat::kBf16;
  s.p_block = index / 2 % 2 == 0 ? 64 : 128;
  s.unused_columns = index / 4 == 2 ? kWideTable : 1;
  for (const int heads : {128, 20}) {
    s.heads = heads;
    s.lengths = {200, 330, 70};
    if (index / 4 == 0) add_empty_requests(s);
    s.unused_pages = 2;
    s.seed = static_cast<std::uint64_t>(index) + 40;
    SCOPED_TRACE(std::to_string(heads) + " heads");
    gpu::Problem problem(s, uneven_data(s.seed));
    if (enough_sms()) {
      const bool fp8 = s.format == KvCacheFormat::kFp8;
      ASSERT_EQ(tiles_of_16_rows(problem), fp8 && index / 4 > 0);
      ASSERT_EQ(problem.plan_chooses_rows(), fp8 && index / 4 == 2);
    }
    expect_agreement(problem, {}, kFewTokensSlack, kFewTokensLse);
    if (enough_sms() && problem.plan_chooses_rows()) {
      EXPECT_EQ(problem.planned_rows_per_cta(), 16);
    }
  }
}

// The sums of l tell which program has run: f16 sums of eight products with 64 rows a CTA, of one
// or two with fewer. A code of P that falls the other way moves both models' lse alike.
void expect_row_sums_of(const gpu::Problem& problem, bool few) {
  const auto reference = problem.reference();
  const auto rows = gpu::sample_rows(reference, 60, 5);
  const bool block64 = problem.shape().p_block == 64;
  const auto wide = gpu::reference_attention(
      reference, rows, nullptr,
      block64 ? gpu::PEmulation::kTensorCore64 : gpu::PEmulation::kTensorCore128);
  const auto narrow = gpu::reference_attention(
      reference, rows, nullptr,
      block64 ? gpu::PEmulation::kTensorCoreFew64 : gpu::PEmulation::kTensorCoreFew128);
  const auto lse = problem.lse();
  int nearer = 0, counted = 0;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const double mine = static_cast<double>(
        lse[static_cast<std::size_t>(rows[i].batch * problem.shape().heads + rows[i].head)]);
    if (std::fabs(wide.lse[i] - narrow.lse[i]) < 1e-5) continue;  // no telling
    const bool is_few = std::fabs(mine - narrow.lse[i]) < std::fabs(mine - wide.lse[i]);
    nearer += is_few == few;
    ++counted;
  }
  EXPECT_GE(counted, 10) << "the models are too close: this shows nothing";
  EXPECT_GE(nearer * 5, counted * 4) << "of " << counted << " rows";
}

// Few rows of many query tokens: here the plan decides for 64 rows a CTA.
TEST_F(CudaSmallPlan, ChoosesTheWidestRowTiles) {
  gpu::ProblemShape s;
  s.heads = 128;
  s.seqlen_q = 16;
  s.lengths = {700};
  s.unused_columns = kWideTable;
  s.p_block = 128;
  gpu::Problem problem(s, uneven_data(60));
  if (enough_sms()) {
    ASSERT_EQ(problem.rows_per_cta(), 64);
    ASSERT_TRUE(problem.plan_chooses_rows());
  }
  expect_agreement(problem, gpu::sample_rows(problem.reference(), 300, 3), kFewTokensSlack,
                   kFewTokensLse);
  if (enough_sms()) {
    EXPECT_EQ(problem.planned_rows_per_cta(), 64);
  }
}

// One workspace, one grid: the plan decides anew for each set of lengths. 26 heads x 16: the grid
// of 16 rows a CTA, 5 parts x 26, is larger than that of 64, 18 x 7.
TEST_F(CudaTest, ThePlanChoosesTheRowsOfACta) {
  if (!enough_sms()) GTEST_SKIP() << "fewer than 132 SMs";
  struct Case {
    int heads, seqlen_q, requests, few, many, width;
  };
  std::uint64_t seed = 700;
  for (const Case& c : {Case{32, 1, 66, 640, 700, 32}, Case{17, 1, 60, 100, 1500, 32},
                        Case{64, 1, 4, 640, 8192, 64}, Case{64, 1, 33, 640, 1000, 64},
                        Case{48, 1, 44, 300, 900, 64}, Case{128, 1, 1, 8192, 32768, 64},
                        Case{128, 1, 16, 640, 1000, 64}, Case{128, 2, 8, 640, 1200, 64},
                        Case{128, 16, 1, 400, 700, 64}, Case{26, 16, 5, 100, 700, 64}}) {
    for (const int p_block : {64, 128}) {
      gpu::ProblemShape s;
      s.heads = c.heads;
      s.seqlen_q = c.seqlen_q;
      s.p_block = p_block;
      s.lengths.assign(static_cast<std::size_t>(c.requests), c.many);
      s.out = seed % 2 == 0 ? DType::kBF16 : DType::kF32;
      s.unused_pages = 2;
      s.unused_columns = kWideTable;
      s.seed = ++seed;
      SCOPED_TRACE(std::to_string(c.heads) + " heads x " + std::to_string(c.seqlen_q) + ", " +
                   std::to_string(c.requests) + " requests, p_block " + std::to_string(p_block));
      gpu::Problem problem(s, uneven_data(seed));
      ASSERT_TRUE(problem.plan_chooses_rows());
      for (const int length : {c.many, c.few, c.many, 1, 0}) {
        SCOPED_TRACE(std::to_string(length) + " tokens");
        std::vector<std::int32_t> lengths = s.lengths;
        for (std::size_t b = 0; b < lengths.size(); ++b)
          lengths[b] = std::max(0, length - static_cast<int>(b % 3));
        problem.set_lengths(lengths);
        ASSERT_EQ(problem.rows_per_cta(), length == c.many ? c.width : 16);
        expect_agreement(problem, gpu::sample_rows(problem.reference(), 100, seed), kFewTokensSlack,
                         kFewTokensLse);
        ASSERT_FALSE(HasFatalFailure());
        EXPECT_EQ(problem.planned_rows_per_cta(), problem.rows_per_cta());
        if (c.seqlen_q == 1 && c.width == 64 && length > 1)
          expect_row_sums_of(problem, problem.rows_per_cta() == 16);
      }
    }
  }
}

// The length around every edge of a page, a tile of two pages and a split, for every number of
// query tokens and around every number of rows at which the kernel changes.
TEST_F(CudaTest, EdgesOfLengthsHeadsAndQueryTokens) {
  std::vector<std::int32_t> lengths;
  for (const int edge : {0, 64, 128, 192, 256, 512, 1024, 4096, 8192}) {
    for (const int offset : {-1, 0, 1}) {
      if (edge + offset >= 0) lengths.push_back(edge + offset);
    }
  }
  std::uint64_t seed = 1;
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const int p_block : {64, 128}) {
      if (format == KvCacheFormat::kBf16 && p_block == 128) continue;
      for (const auto& [heads, seqlen_q] : std::vector<std::pair<int, int>>{{1, 1},
                                                                            {15, 1},
                                                                            {16, 1},
                                                                            {17, 1},
                                                                            {31, 1},
                                                                            {32, 1},
                                                                            {33, 1},
                                                                            {63, 1},
                                                                            {64, 1},
                                                                            {65, 1},
                                                                            {127, 1},
                                                                            {128, 1},
                                                                            {128, 2},
                                                                            {16, 4},
                                                                            {7, 5},
                                                                            {3, 16},
                                                                            {40, 3},
                                                                            {128, 16},
                                                                            {1, 16}}) {
        for (const bool deterministic : {false, true}) {
          gpu::ProblemShape s;
          s.format = format;
          s.p_block = p_block;
          s.heads = heads;
          s.seqlen_q = seqlen_q;
          s.lengths = lengths;
          s.deterministic = deterministic;
          s.unused_pages = 4;
          s.unused_columns = 1;
          s.out = seed % 2 == 0 ? DType::kBF16 : DType::kF32;
          s.seed = ++seed;
          SCOPED_TRACE(std::string(to_string(format)) + " heads " + std::to_string(heads) + " x " +
                       std::to_string(seqlen_q) + " p_block " + std::to_string(p_block) +
                       (deterministic ? " deterministic" : " balanced"));
          gpu::Problem problem(s, uneven_data(seed));
          // Every row of the shapes with few rows, a sample of the others.
          expect_agreement(problem, gpu::sample_rows(problem.reference(), 1500, seed), 3e-3,
                           kFewTokensLse);
          ASSERT_FALSE(HasFatalFailure());
        }
      }
    }
  }
}

// The same edges with so few tiles that the FP8 kernel takes 16 rows a CTA, the last of them
// perhaps less. 17 heads x 16: 17 row tiles and 7 parts, a grid that clusters of two do not fill.
TEST_F(CudaTest, EdgesOfLengthsInTilesOf16Rows) {
  if (!enough_sms()) GTEST_SKIP() << "fewer than 132 SMs";
  const std::vector<std::int32_t> edges = {0,   1,   63,  64,  65,  127, 128, 129, 191,
                                           192, 193, 255, 256, 257, 511, 512, 513, 640};
  std::uint64_t seed = 500;
  for (const int p_block : {64, 128}) {
    for (const auto& [heads, seqlen_q] : std::vector<std::pair<int, int>>{{17, 1},
                                                                          {32, 1},
                                                                          {33, 1},
                                                                          {63, 1},
                                                                          {64, 1},
                                                                          {96, 1},
                                                                          {128, 1},
                                                                          {128, 2},
                                                                          {7, 5},
                                                                          {40, 3},
                                                                          {5, 16},
                                                                          {17, 16}}) {
      for (std::size_t first = 0; first < edges.size(); first += 6) {
        gpu::ProblemShape s;
        s.p_block = p_block;
        s.heads = heads;
        s.seqlen_q = seqlen_q;
        s.lengths.assign(edges.begin() + static_cast<std::ptrdiff_t>(first),
                         edges.begin() + static_cast<std::ptrdiff_t>(first) + 6);
        s.unused_pages = 4;
        s.unused_columns = 1;
        s.out = seed % 2 == 0 ? DType::kBF16 : DType::kF32;
        s.image = readable(seed % 3 == 0 ? PageImage::kPlainRows : PageImage::kSwizzled128);
        s.seed = ++seed;
        SCOPED_TRACE(std::to_string(heads) + " heads x " + std::to_string(seqlen_q) + ", p_block " +
                     std::to_string(p_block) + ", from length " + std::to_string(edges[first]));
        gpu::Problem problem(s, uneven_data(seed));
        ASSERT_TRUE(tiles_of_16_rows(problem));
        expect_agreement(problem, {}, kFewTokensSlack, kFewTokensLse);
        ASSERT_FALSE(HasFatalFailure());
      }
    }
  }
}

// Batches from 1 to 200, even, ragged, and with empty requests between.
TEST_F(CudaTest, BatchesUpTo200) {
  std::uint64_t state = 42;
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const int batch : {1, 2, 3, 7, 16, 33, 66, 131, 132, 133, 200}) {
      for (const bool deterministic : {false, true}) {
        gpu::ProblemShape s;
        s.format = format;
        s.heads = batch % 2 == 0 ? 128 : 16;
        s.deterministic = deterministic;
        s.seed = gpu::mix(state);
        s.unused_columns = 3;
        for (int b = 0; b < batch; ++b) {
          const double u = static_cast<double>(gpu::mix(state) >> 11) * 0x1p-53;
          s.lengths.push_back(b % 13 == 5 ? 0 : static_cast<std::int32_t>(std::exp2(13.0 * u)));
        }
        SCOPED_TRACE("batch " + std::to_string(batch) + (deterministic ? " deterministic" : ""));
        gpu::Problem problem(s, uneven_data(s.seed % 1000));
        expect_agreement(problem, gpu::sample_rows(problem.reference(), 800, 3), 4e-3,
                         kFewTokensLse);
        ASSERT_FALSE(HasFatalFailure());
      }
    }
  }
}

// One request over the whole GPU: as many splits as there can be.
TEST_F(CudaTest, LongContextsInManySplits) {
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const int length : {30000, 131072}) {
      for (const int heads : {128, 16}) {
        for (const bool deterministic : {false, true}) {
          gpu::ProblemShape s;
          s.format = format;
          s.heads = heads;
          s.lengths = {length, 100, length / 3};
          s.deterministic = deterministic;
          SCOPED_TRACE(std::to_string(length) + " tokens, " + std::to_string(heads) + " heads");
          gpu::Problem problem(s, uneven_data(9));
          expect_agreement(problem, gpu::sample_rows(problem.reference(), 64, 3), kManyTokensSlack,
                           kManyTokensLse);
        }
      }
    }
  }
}

// Few tiles for each SM: every piece in a part of its own, merged by combine, whose groups share
// blocks in several ways.
TEST_F(CudaTest, FewTilesForEachPart) {
  std::uint64_t seed = 77;
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const int batch : {1, 2, 3, 5, 8, 9, 16, 24}) {
      for (const int length : {640, 2000, 8192}) {
        for (const int heads : {128, 64, 32, 16}) {
          gpu::ProblemShape s;
          s.format = format;
          s.heads = heads;
          s.lengths.assign(static_cast<std::size_t>(batch), length - 3);
          s.lengths.back() += 3;
          // Tables of both kinds: as wide as the requests, and so wide that the plan says how many
          // rows share a CTA.
          s.unused_columns = heads == 64 || (heads == 128 && batch % 2 == 1) ? kWideTable : 0;
          SCOPED_TRACE(std::to_string(batch) + " x " + std::to_string(length) + ", " +
                       std::to_string(heads) + " heads");
          gpu::Problem problem(s, uneven_data(++seed));
          expect_agreement(problem, gpu::sample_rows(problem.reference(), 48, seed), 4e-3,
                           kFewTokensLse);
          ASSERT_FALSE(HasFatalFailure());
        }
      }
    }
  }
}

// Every way in which combine shares its blocks, which follows from rows, batch and the table's
// width: one to four requests, long ones, short ones in wide tables, empty ones; one long request
// among many short ones, whose pieces are weighed a few at a time.
TEST_F(CudaTest, CombineSharesItsBlocks) {
  std::vector<std::vector<std::int32_t>> batches = {{20000}, {640},         {1},
                                                    {0},     {16384, 9000}, {12000, 0, 300, 7}};
  for (const int others : {5, 20, 100}) {
    batches.emplace_back(static_cast<std::size_t>(others), 5);
    batches.back()[static_cast<std::size_t>(others / 2)] = 60000;
  }
  std::uint64_t seed = 900;
  for (const auto& lengths : batches) {
    const bool all_long = *std::min_element(lengths.begin(), lengths.end()) > 8000;
    for (const auto& [heads, seqlen_q] : std::vector<std::pair<int, int>>{
             {8, 1}, {16, 1}, {32, 1}, {40, 1}, {64, 1}, {128, 1}, {64, 3}}) {
      gpu::ProblemShape s;
      s.heads = heads;
      s.seqlen_q = seqlen_q;
      s.lengths = lengths;
      s.unused_columns = lengths[0] < 1000 && lengths.size() == 1 ? kWideTable : 1;
      s.out = seed % 2 == 0 ? DType::kBF16 : DType::kF32;
      s.seed = ++seed;
      SCOPED_TRACE(std::to_string(lengths.size()) + " requests, the first of " +
                   std::to_string(lengths[0]) + ", " + std::to_string(heads) + " heads x " +
                   std::to_string(seqlen_q));
      // Long requests of plain data are the sharper check: their scores spread less, so that the
      // tensor cores' cut is small.
      const bool plain = all_long && seed % 2 == 0;
      gpu::Problem problem(s, plain ? gpu::ProblemData{} : uneven_data(seed));
      expect_agreement(problem, gpu::sample_rows(problem.reference(), 48, seed),
                       plain ? kManyTokensSlack : 4e-3, kFewTokensLse);
      ASSERT_FALSE(HasFatalFailure());
    }
  }
}

// Big shapes of the benchmark, both images, three tensors.
TEST_F(CudaTest, BenchmarkShapes) {
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const auto& [heads, seqlen_q] :
         std::vector<std::pair<int, int>>{{128, 1}, {128, 2}, {64, 1}, {32, 1}, {16, 1}}) {
      for (const bool separate : {false, true}) {
        gpu::ProblemShape s;
        s.format = format;
        s.heads = heads;
        s.seqlen_q = seqlen_q;
        s.lengths.assign(32, 8192);
        s.separate_tensors = separate;
        s.image = readable(separate ? PageImage::kPlainRows : PageImage::kSwizzled128);
        SCOPED_TRACE(std::to_string(heads) + " x " + std::to_string(seqlen_q));
        gpu::Problem problem(s);
        expect_agreement(problem, gpu::sample_rows(problem.reference(), 96, 3), kManyTokensSlack,
                         kManyTokensLse);
      }
    }
  }
}

// The layout of the paper's engine: three tensors of plain rows; and plain rows in one pool.
TEST_F(CudaTest, DecodeReadsPlainRows) {
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const bool separate : {false, true}) {
      for (const int heads : {16, 128}) {
        gpu::ProblemShape s;
        s.format = format;
        s.image = PageImage::kPlainRows;
        s.separate_tensors = separate;
        s.heads = heads;
        s.lengths = {1, 64, 1000, 129};
        s.unused_pages = 2;
        if (separate) add_empty_requests(s);
        gpu::Problem problem(s, uneven_data(31));
        expect_agreement(problem, {}, 3e-3, kFewTokensLse);
      }
    }
  }
}

// Rows that see nothing: out exactly 0, lse exactly -inf; their neighbours are not disturbed.
TEST_F(CudaTest, EmptyRowsAreZero) {
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const bool deterministic : {false, true}) {
      gpu::ProblemShape s;
      s.format = format;
      s.heads = 24;
      s.seqlen_q = 6;
      s.lengths = {0, 1, 5, 6, 0, 7, 0};
      s.deterministic = deterministic;
      s.unused_pages = 2;
      s.unused_columns = deterministic ? 1 : kWideTable;
      gpu::Problem problem(s);
      run(problem);
      const auto out = problem.out(), lse = problem.lse();
      for (std::int64_t b = 0; b < 7; ++b) {
        for (std::int64_t t = 0; t < 6; ++t) {
          const bool empty = s.lengths[static_cast<std::size_t>(b)] - 6 + t + 1 <= 0;
          for (std::int64_t h = 0; h < 24; ++h) {
            const float l = lse[static_cast<std::size_t>((b * 24 + h) * 6 + t)];
            EXPECT_EQ(l == -INFINITY, empty) << b << " " << t << " " << h << " lse " << l;
            for (std::int64_t d = 0; d < 512 && empty; ++d) {
              ASSERT_EQ(out[static_cast<std::size_t>(((b * 6 + t) * 24 + h) * 512 + d)], 0.0f);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace snapmla::test
