// Shared by the tests that need a GPU: the fixture and the comparisons.
//
// Without a usable GPU the tests are skipped, or fail when SNAPMLA_REQUIRE_CUDA is set, as the GPU
// command sets it. Suites with "Small" in their names are small enough for compute-sanitizer.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "gpu/problem.h"
#include "gpu/reference.h"

namespace snapmla::test {

class CudaTest : public ::testing::Test {
 protected:
  void SetUp() override;
  void TearDown() override;  // an error of the device that nobody looked at fails the test
};

// Keys whose tokens differ in size by up to 2^(2 spread), so that scales matter; normal queries.
gpu::ProblemData uneven_data(std::uint64_t seed, float spread = 2.0f);

// `wanted`, or the swizzled image where decode refuses plain rows as unsupported: then the test
// DecodeReadsPlainRows fails, and the others still show what they are for.
PageImage readable(PageImage wanted);

// Whether decode computes the problem by 16 rows a CTA although it has more: few tiles. Requests
// without a token keep it from that, whatever their number of heads; a block table wider than the
// requests leaves it to the plan.
bool tiles_of_16_rows(const gpu::Problem& problem);
void add_empty_requests(gpu::ProblemShape& shape);
inline constexpr std::int64_t kWideTable = 4000;  // unused columns

// Whether the GPU has as many SMs as an H100 SXM or H200: with fewer, the tests' few tiles are not
// few.
bool enough_sms();

// Plan, decode, wait.
void run(gpu::Problem& problem);

struct Errors {
  double out = 0;  // |x - y| / |y| over all rows given; NaN anywhere makes it NaN
  double lse = 0;  // largest absolute difference of finite values; NaN where exactly one is finite
  double worst_row = 0;  // relative error of the worst row
};
// `out` [all rows, 512] and `lse` [batch, heads, seqlen_q] of a problem at `rows`, against `exact`.
Errors errors_against(const gpu::ReferenceResult& exact, const std::vector<gpu::ReferenceRow>& rows,
                      const gpu::Problem& problem, const std::vector<float>& out,
                      const std::vector<float>& lse);
// The same for two references of the same rows.
Errors errors_between(const gpu::ReferenceResult& exact, const gpu::ReferenceResult& other);

// What rounding the output costs at most in relative L2.
double rounding_of(DType out);

// Runs the problem and compares it with the exact attention and with the emulation of its P on
// `rows` (empty: all of them):
//   BF16  out within 4e-3 + rounding, lse within 2e-3 of exact
//   FP8   out at most 1.05 times as far from exact as the emulation plus `slack` and rounding;
//         lse within `lse_slack` of the emulation's
// slack allows for few rows of few tokens, where one P code that flips counts.
void expect_agreement(gpu::Problem& problem, std::vector<gpu::ReferenceRow> rows, double slack,
                      double lse_slack);

}  // namespace snapmla::test
