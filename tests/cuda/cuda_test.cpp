#include "cuda/cuda_test.h"

#include <algorithm>
#include <cstdlib>

#include "gpu/fill.h"
#include "snapmla/cuda.h"
#include "snapmla/error.h"

namespace snapmla::test {

void CudaTest::SetUp() {
  const char* reason = cuda::unavailable_reason();
  if (reason[0] == '\0') return;
  const char* required = std::getenv("SNAPMLA_REQUIRE_CUDA");
  if (required != nullptr && required[0] != '\0') FAIL() << "a GPU is required, but " << reason;
  GTEST_SKIP() << reason;
}

void CudaTest::TearDown() {
  if (IsSkipped() || cuda::unavailable_reason()[0] != '\0') return;
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

gpu::ProblemData uneven_data(std::uint64_t seed, float spread) {
  gpu::ProblemData data;
  data.keys = [seed, spread](BFloat16* latent, BFloat16* rope, std::int64_t first,
                             std::int64_t count, cudaStream_t stream) {
    const std::uint64_t part = seed * 100000 + static_cast<std::uint64_t>(first);
    gpu::fill_normal(latent, count * kKvLoraRank, part * 4, stream);
    gpu::fill_normal(rope, count * kQkRopeHeadDim, part * 4 + 1, stream);
    gpu::scale_rows(latent, count, kKvLoraRank, part * 4 + 2, stream, spread);
  };
  data.queries = [seed](BFloat16* latent, BFloat16* rope, std::int64_t rows, cudaStream_t stream) {
    gpu::fill_normal(latent, rows * kKvLoraRank, seed * 7 + 5, stream, 0.6f);
    gpu::fill_normal(rope, rows * kQkRopeHeadDim, seed * 7 + 6, stream);
  };
  return data;
}

PageImage readable(PageImage wanted) {
  static const bool plain_rows = [] {
    gpu::ProblemShape s;
    s.image = PageImage::kPlainRows;
    s.heads = 1;
    s.lengths = {1};
    gpu::Problem problem(s);
    try {
      run(problem);
    } catch (const Error& e) {
      if (e.code() == ErrorCode::kUnsupported) return false;
      throw;
    }
    return true;
  }();
  return plain_rows ? wanted : PageImage::kSwizzled128;
}

bool tiles_of_16_rows(const gpu::Problem& problem) {
  return problem.rows_per_cta() == 16 && problem.shape().seqlen_q * problem.shape().heads > 16;
}

void add_empty_requests(gpu::ProblemShape& shape) {
  const std::int64_t tiles = (shape.heads * shape.seqlen_q + 15) / 16;
  while (shape.batch() * tiles <= gpu::num_sms()) shape.lengths.push_back(0);
}

bool enough_sms() { return gpu::num_sms() >= 132; }

void run(gpu::Problem& problem) {
  problem.poison_outputs();
  SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
  gpu::OwnedStream stream;
  problem.plan(stream.get());
  problem.decode(stream.get());
  stream.wait();
}

namespace {

struct Accumulator {
  double difference = 0, size = 0, worst = 0, lse = 0;

  template <class F>
  void add_row(const double* exact, double exact_lse, double got_lse, F&& got) {
    double row_difference = 0, row_size = 0;
    for (int d = 0; d < kKvLoraRank; ++d) {
      const double e = got(d) - exact[d];
      row_difference += e * e;
      row_size += exact[d] * exact[d];
    }
    difference += row_difference;
    size += row_size;
    const double relative = std::sqrt(row_difference / (row_size > 0 ? row_size : 1.0));
    worst = std::isnan(relative) || std::isnan(worst) ? std::nan("") : std::max(worst, relative);
    if (std::isinf(exact_lse) && exact_lse == got_lse) return;
    const double e = std::fabs(got_lse - exact_lse);
    lse = std::isfinite(e) && !std::isnan(lse) ? std::max(lse, e) : std::nan("");
  }

  Errors result() const { return {std::sqrt(difference / (size > 0 ? size : 1.0)), lse, worst}; }
};

}  // namespace

Errors errors_against(const gpu::ReferenceResult& exact, const std::vector<gpu::ReferenceRow>& rows,
                      const gpu::Problem& problem, const std::vector<float>& out,
                      const std::vector<float>& lse) {
  const gpu::ProblemShape& s = problem.shape();
  Accumulator total;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const gpu::ReferenceRow& r = rows[i];
    const auto at = static_cast<std::size_t>((r.batch * s.seqlen_q + r.token) * s.heads + r.head);
    const auto lse_at =
        static_cast<std::size_t>((r.batch * s.heads + r.head) * s.seqlen_q + r.token);
    total.add_row(&exact.out[i * kKvLoraRank], exact.lse[i], static_cast<double>(lse[lse_at]),
                  [&](int d) {
                    return static_cast<double>(out[at * kKvLoraRank + static_cast<std::size_t>(d)]);
                  });
  }
  return total.result();
}

Errors errors_between(const gpu::ReferenceResult& exact, const gpu::ReferenceResult& other) {
  Accumulator total;
  for (std::size_t i = 0; i < exact.lse.size(); ++i) {
    total.add_row(&exact.out[i * kKvLoraRank], exact.lse[i], other.lse[i],
                  [&](int d) { return other.out[i * kKvLoraRank + static_cast<std::size_t>(d)]; });
  }
  return total.result();
}

double rounding_of(DType out) { return out == DType::kF32 ? 0.0 : 0x1p-9; }

void expect_agreement(gpu::Problem& problem, std::vector<gpu::ReferenceRow> rows, double slack,
                      double lse_slack) {
  run(problem);
  const gpu::ProblemShape& s = problem.shape();
  const gpu::ReferenceProblem reference = problem.reference();
  if (rows.empty()) rows = gpu::all_rows(reference);
  const std::vector<float> out = problem.out(), lse = problem.lse();
  for (std::size_t i = 0; i < lse.size(); ++i) {
    ASSERT_EQ(std::isnan(lse[i]), !s.lse)
        << "lse " << i << " is NaN: not written, or poison was read; or it was not asked for";
  }
  for (std::size_t i = 0; i < out.size(); ++i) {
    ASSERT_FALSE(std::isnan(out[i]))
        << "out of row " << i / 512 << " is NaN: not written, or poison was read";
  }
  const auto exact = gpu::reference_attention(reference, rows, nullptr);
  const Errors got = errors_against(exact, rows, problem, out, lse);
  const double rounding = rounding_of(s.out);
  if (s.format == KvCacheFormat::kBf16) {
    EXPECT_LE(got.out, 4e-3 + rounding);
    EXPECT_LE(got.worst_row, 2e-2 + rounding);
    if (s.lse) {
      EXPECT_LE(got.lse, 2e-3);
    }
    return;
  }
  const auto emulated = gpu::reference_attention(
      reference, rows, nullptr,
      s.p_block == 64 ? gpu::PEmulation::kBlock64 : gpu::PEmulation::kBlock128);
  const Errors expected = errors_between(exact, emulated);
  EXPECT_LE(got.out, std::hypot(1.05 * expected.out, rounding) + slack)
      << "the fp64 emulation's error is " << expected.out;
  EXPECT_LE(got.worst_row, std::hypot(2 * expected.worst_row, rounding) + 4e-2);
  const Errors from_emulation = errors_against(emulated, rows, problem, out, lse);
  if (s.lse) {
    EXPECT_LE(from_emulation.lse, lse_slack);
  }
}

}  // namespace snapmla::test
