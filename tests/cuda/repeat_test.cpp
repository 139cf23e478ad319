// The same call gives the same bits: a thousand times, beside another stream, in a captured graph
// with other lengths and tables, and, with a deterministic plan, in any batch.
#include "cuda/cuda_test.h"
#include "gpu/fill.h"

namespace snapmla::test {
namespace {

gpu::ProblemShape ragged_shape(KvCacheFormat format, int heads, bool deterministic,
                               int p_block = 64) {
  gpu::ProblemShape s;
  s.p_block = p_block;
  s.format = format;
  s.heads = heads;
  s.seqlen_q = 2;
  s.lengths = {5000, 64, 1, 0, 129, 20000, 777};
  s.deterministic = deterministic;
  s.unused_pages = 3;
  s.unused_columns = 2;
  return s;
}

// So short that the FP8 kernel takes 16 rows a CTA.
gpu::ProblemShape short_shape(KvCacheFormat format, int heads) {
  gpu::ProblemShape s = ragged_shape(format, heads, false);
  s.lengths = {500, 64, 1, 0, 129, 640, 77};
  return s;
}

struct Repeated {
  bool short_requests, deterministic, wide_table;
  int p_block;
};

TEST_F(CudaTest, AThousandTimesTheSameBits) {
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    const bool fp8 = format == KvCacheFormat::kFp8;
    for (const int heads : {128, 16}) {
      for (const Repeated& kind :
           {Repeated{false, false, false, 64}, Repeated{false, true, false, 64},
            Repeated{true, false, false, 64}, Repeated{true, false, true, 64},
            Repeated{false, false, false, 128}, Repeated{false, true, false, 128}}) {
        if ((kind.wide_table || kind.p_block == 128) && !fp8) continue;
        gpu::ProblemShape shape =
            kind.short_requests ? short_shape(format, heads)
                                : ragged_shape(format, heads, kind.deterministic, kind.p_block);
        if (kind.wide_table) shape.unused_columns = kWideTable;
        gpu::Problem problem(shape, uneven_data(4));
        if (enough_sms()) {
          ASSERT_EQ(problem.plan_chooses_rows(),
                    fp8 && !kind.deterministic && (kind.wide_table || !kind.short_requests));
          ASSERT_EQ(tiles_of_16_rows(problem),
                    fp8 && (kind.short_requests || (!kind.deterministic && heads == 16)));
        }
        run(problem);
        const gpu::DeviceBuffer<std::uint8_t> first(problem.out_bits());
        const MlaDecodeArgs args = problem.decode_args();
        const auto out_bytes =
            static_cast<std::int64_t>(static_cast<std::size_t>(problem.shape().rows()) * 512 * 2);
        gpu::OwnedStream stream;
        std::int64_t mismatches = 0;
        for (int i = 0; i < 1000; ++i) {
          if (i % 10 == 0) problem.poison_outputs();
          if (i % 10 == 0) SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
          if (i % 3 == 0) problem.plan(stream.get());
          problem.decode(stream.get());
          mismatches += gpu::count_mismatches(static_cast<const std::uint8_t*>(args.out.raw()),
                                              first.data(), out_bytes, stream.get());
          mismatches += gpu::count_mismatches(static_cast<const std::uint8_t*>(args.lse.raw()),
                                              first.data() + out_bytes, problem.shape().rows() * 4,
                                              stream.get());
        }
        EXPECT_EQ(mismatches, 0) << to_string(format) << " heads " << heads;
        problem.check_guards();
      }
    }
  }
}

// Requests of two and three splits, which the FP8 decode kernel merges itself: whichever CTA comes
// last, the bits are the same, and its counters are ready for the next call under the same plan.
TEST_F(CudaTest, MergedSplitsDoNotDependOnWhoIsLast) {
  for (const int heads : {128, 64, 32, 5}) {
    for (const int seqlen_q : {1, 2}) {
      for (const bool deterministic : {false, true}) {
        gpu::ProblemShape s;
        s.format = KvCacheFormat::kFp8;
        s.heads = heads;
        s.seqlen_q = seqlen_q;
        s.deterministic = deterministic;
        for (int b = 0; b < (heads > 64 ? 40 : 80); ++b)  // 33 to 94 tiles: two or three splits
          s.lengths.push_back(deterministic ? 4200 + 97 * b : 12000 - 61 * (b % 7));
        SCOPED_TRACE(std::to_string(heads) + " heads" + (deterministic ? ", deterministic" : ""));
        gpu::Problem problem(s, uneven_data(static_cast<std::uint64_t>(heads)));
        expect_agreement(problem, gpu::sample_rows(problem.reference(), 200, 3), 4e-3, 8e-2);
        const gpu::DeviceBuffer<std::uint8_t> first(problem.out_bits());
        const MlaDecodeArgs args = problem.decode_args();
        const std::int64_t out_bytes = problem.shape().rows() * 512 * 2;
        gpu::OwnedStream stream;
        std::int64_t mismatches = 0;
        for (int i = 0; i < 100; ++i) {
          problem.poison_outputs();
          SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
          problem.decode(stream.get());
          mismatches += gpu::count_mismatches(static_cast<const std::uint8_t*>(args.out.raw()),
                                              first.data(), out_bytes, stream.get());
          mismatches += gpu::count_mismatches(static_cast<const std::uint8_t*>(args.lse.raw()),
                                              first.data() + out_bytes, problem.shape().rows() * 4,
                                              stream.get());
        }
        EXPECT_EQ(mismatches, 0);
        problem.check_guards();
      }
    }
  }
}

using Lengths = std::vector<std::int32_t>;

// Replays `graph` with the lengths of each step, its pages elsewhere in the pool; each replay must
// equal direct calls bit for bit and agree with the reference.
void expect_replays(gpu::Problem& problem, const gpu::OwnedGraph& graph, gpu::OwnedStream& stream,
                    const Lengths& longest, const std::vector<Lengths>& steps, double lse_slack) {
  for (std::size_t i = 0; i < steps.size(); ++i) {
    SCOPED_TRACE("step " + std::to_string(i));
    problem.set_lengths(longest);
    problem.relabel_pages(100 + i);
    problem.set_lengths(steps[i]);
    problem.poison_outputs();
    SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
    graph.launch(stream.get());
    stream.wait();
    const auto replayed = problem.out_bits();
    run(problem);
    EXPECT_EQ(replayed, problem.out_bits());
    expect_agreement(problem, gpu::sample_rows(problem.reference(), 60, i), 1.5e-2, lse_slack);
  }
}

// A graph holds plan, quantize_q and decode. Between replays the lengths, the page table and the
// place of the pages in the pool change.
TEST_F(CudaTest, GraphReplaysFollowLengthsAndTables) {
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const bool deterministic : {false, true}) {
      const gpu::ProblemShape s = ragged_shape(format, 128, deterministic);
      gpu::Problem problem(s, uneven_data(5));
      run(problem);  // loads the kernels, which must not happen inside a capture
      gpu::OwnedStream stream;
      const gpu::OwnedGraph graph(stream.get(), [&](cudaStream_t in) {
        problem.plan(in);
        problem.quantize(in);
        problem.decode(in);
      });
      expect_replays(problem, graph, stream, s.lengths,
                     {{5000, 64, 1, 0, 129, 20000, 777},
                      {4999, 2, 0, 0, 128, 19000, 776},
                      {1, 1, 1, 0, 1, 1, 1},
                      {0, 0, 0, 0, 0, 0, 0},
                      {5000, 64, 1, 0, 129, 20000, 777},
                      {0, 0, 0, 0, 0, 16384, 0}},
                     5e-2);
    }
  }
}

TEST_F(CudaTest, GraphReplaysOfShortRequestsFollowLengths) {
  if (!enough_sms()) GTEST_SKIP() << "fewer than 132 SMs";
  const gpu::ProblemShape s = short_shape(KvCacheFormat::kFp8, 128);
  gpu::Problem problem(s, uneven_data(5));
  ASSERT_TRUE(tiles_of_16_rows(problem));
  run(problem);
  gpu::OwnedStream stream;
  const gpu::OwnedGraph graph(stream.get(), [&](cudaStream_t in) {
    problem.plan(in);
    problem.decode(in);
  });
  expect_replays(problem, graph, stream, s.lengths,
                 {{500, 64, 1, 0, 129, 640, 77},
                  {1, 1, 1, 0, 1, 1, 1},
                  {0, 0, 0, 0, 0, 0, 0},
                  {499, 2, 0, 0, 128, 512, 76},
                  {0, 0, 0, 0, 0, 384, 0}},
                 8e-2);
}

TEST_F(CudaTest, TwoStreamsWithTwoWorkspaces) {
  gpu::Problem a(ragged_shape(KvCacheFormat::kFp8, 128, false), uneven_data(6));
  gpu::ProblemShape other = ragged_shape(KvCacheFormat::kFp8, 32, false);
  other.lengths = {3000, 17, 2500};
  other.unused_columns = kWideTable;
  gpu::Problem b(other, uneven_data(7));
  gpu::Problem c(ragged_shape(KvCacheFormat::kBf16, 64, false), uneven_data(8));
  std::vector<gpu::Problem*> problems = {&a, &b, &c};
  std::vector<std::vector<std::uint8_t>> alone;
  for (auto* p : problems) {
    run(*p);
    alone.push_back(p->out_bits());
    p->poison_outputs();
  }
  SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
  std::vector<gpu::OwnedStream> streams(problems.size());
  for (int round = 0; round < 200; ++round) {
    for (std::size_t i = 0; i < problems.size(); ++i) {
      problems[i]->plan(streams[i].get());
      problems[i]->decode(streams[i].get());
    }
  }
  SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
  for (std::size_t i = 0; i < problems.size(); ++i) EXPECT_EQ(problems[i]->out_bits(), alone[i]);
}

// With a deterministic plan, request 0 gives the same bits alone and among others.
TEST_F(CudaTest, DeterministicRowsDoNotDependOnTheBatch) {
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const int length : {100, 5000, 40000}) {
      gpu::ProblemShape s;
      s.format = format;
      s.heads = 128;
      s.deterministic = true;
      s.lengths = {length};
      // Keys depend on the token's number and request 0 comes first; queries on the row's number.
      gpu::Problem alone(s, uneven_data(11));
      run(alone);
      const auto x = alone.out(), lx = alone.lse();
      for (const int others : {6, 40}) {
        s.lengths = {length};
        for (int b = 0; b < others; ++b) s.lengths.push_back(b % 6 == 5 ? 33333 - b : 61 * b * b);
        s.unused_columns = 3;
        gpu::Problem among(s, uneven_data(11));
        run(among);
        const auto y = among.out(), ly = among.lse();
        for (std::size_t i = 0; i < x.size(); ++i) ASSERT_EQ(x[i], y[i]) << "element " << i;
        for (std::size_t i = 0; i < lx.size(); ++i) ASSERT_EQ(lx[i], ly[i]) << "lse " << i;
      }
    }
  }
}

}  // namespace
}  // namespace snapmla::test
