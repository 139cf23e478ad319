// NaN and infinity reach exactly the rows that see them, and nothing else.
#include <cstring>

#include "cuda/cuda_test.h"

namespace snapmla::test {
namespace {

constexpr int kHeads = 20, kQueryTokens = 3, kLength = 330, kBadToken = 328;

// `widest`: the FP8 kernel takes up to 64 rows a CTA, else 16.
gpu::ProblemShape small_shape(KvCacheFormat format, int p_block, bool deterministic,
                              bool widest = false) {
  gpu::ProblemShape s;
  s.format = format;
  s.heads = kHeads;
  s.seqlen_q = kQueryTokens;
  s.lengths = {200, kLength, 70};  // request 1 gets the bad token
  s.p_block = p_block;
  s.deterministic = deterministic;
  s.unused_pages = 2;
  s.unused_columns = 1;
  if (widest) add_empty_requests(s);
  return s;
}

// Query token t of request 1 sees tokens below kLength - kQueryTokens + t + 1.
void expect_nan_rows(const gpu::Problem& problem) {
  const auto out = problem.out(), lse = problem.lse();
  for (std::int64_t b = 0; b < 3; ++b) {
    for (std::int64_t t = 0; t < kQueryTokens; ++t) {
      const bool sees = b == 1 && kBadToken < kLength - kQueryTokens + t + 1;
      for (std::int64_t h = 0; h < kHeads; ++h) {
        EXPECT_EQ(std::isnan(lse[static_cast<std::size_t>((b * kHeads + h) * kQueryTokens + t)]),
                  sees)
            << "lse of request " << b << " token " << t << " head " << h;
        const auto row = static_cast<std::size_t>((b * kQueryTokens + t) * kHeads + h);
        for (std::size_t d = 0; d < 512; ++d) {
          ASSERT_EQ(std::isnan(out[row * 512 + d]), sees)
              << "out of request " << b << " token " << t << " head " << h << " dim " << d;
        }
      }
    }
  }
}

class CudaSmallNan : public CudaTest {};

TEST_F(CudaSmallNan, AScaleThatIsNotPositive) {
  for (const int p_block : {64, 128}) {
    for (const bool deterministic : {false, true}) {
      for (const float bad : {std::nanf(""), 0.0f, -1.0f}) {
        SCOPED_TRACE("scale " + std::to_string(bad) + " p_block " + std::to_string(p_block));
        gpu::Problem problem(small_shape(KvCacheFormat::kFp8, p_block, deterministic, bad == 0.0f));
        SNAPMLA_CUDA_CHECK(
            cudaMemcpy(problem.scale_of(1, kBadToken), &bad, 4, cudaMemcpyHostToDevice));
        run(problem);
        expect_nan_rows(problem);
      }
    }
  }
}

TEST_F(CudaSmallNan, ANanCodeInTheLatent) {
  for (const int p_block : {64, 128}) {
    for (const bool widest : {false, true}) {
      SCOPED_TRACE("p_block " + std::to_string(p_block));
      gpu::Problem problem(small_shape(KvCacheFormat::kFp8, p_block, false, widest));
      if (enough_sms()) {
        ASSERT_EQ(tiles_of_16_rows(problem), !widest);
      }
      const std::uint8_t code = 0x7f;
      SNAPMLA_CUDA_CHECK(
          cudaMemcpy(problem.latent_code_of(1, kBadToken, 77), &code, 1, cudaMemcpyHostToDevice));
      run(problem);
      expect_nan_rows(problem);
    }
  }
}

TEST_F(CudaSmallNan, ANanInTheBf16Cache) {
  gpu::Problem problem(small_shape(KvCacheFormat::kBf16, 64, false));
  const std::uint16_t bits = 0x7fc0;
  SNAPMLA_CUDA_CHECK(
      cudaMemcpy(problem.latent_code_of(1, kBadToken, 77), &bits, 2, cudaMemcpyHostToDevice));
  run(problem);
  expect_nan_rows(problem);
}

// append_kv gives a token with any NaN or infinity a NaN scale.
TEST_F(CudaSmallNan, ANonFiniteKeyThatWasAppended) {
  for (const std::uint16_t bits :
       {std::uint16_t{0x7fc0}, std::uint16_t{0x7f80}, std::uint16_t{0xff80}}) {
    for (const bool in_rope : {false, true}) {
      gpu::ProblemData data;
      data.keys = [&](BFloat16* latent, BFloat16* rope, std::int64_t first, std::int64_t count,
                      cudaStream_t stream) {
        ASSERT_EQ(first, 0);
        uneven_data(3).keys(latent, rope, first, count, stream);
        const std::int64_t token = 200 + kBadToken;
        BFloat16* at = in_rope ? rope + token * 64 + 9 : latent + token * 512 + 300;
        SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
        SNAPMLA_CUDA_CHECK(cudaMemcpy(at, &bits, 2, cudaMemcpyHostToDevice));
      };
      for (const int p_block : {64, 128}) {
        SCOPED_TRACE("p_block " + std::to_string(p_block));
        gpu::Problem problem(small_shape(KvCacheFormat::kFp8, p_block, false, in_rope), data);
        run(problem);
        expect_nan_rows(problem);
      }
    }
  }
}

TEST_F(CudaSmallNan, ANonFiniteQueryReachesItsOwnRowOnly) {
  gpu::ProblemData data;
  data.queries = [&](BFloat16* latent, BFloat16* rope, std::int64_t rows, cudaStream_t stream) {
    uneven_data(3).queries(latent, rope, rows, stream);
    SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
    const std::uint16_t infinity = 0x7f80;  // row: request 1, token 1, head 7
    const std::int64_t row = (1 * kQueryTokens + 1) * kHeads + 7;
    SNAPMLA_CUDA_CHECK(cudaMemcpy(latent + row * 512 + 4, &infinity, 2, cudaMemcpyHostToDevice));
  };
  for (const int p_block : {64, 128}) {
    SCOPED_TRACE("p_block " + std::to_string(p_block));
    for (const bool widest : {false, true}) {
      gpu::Problem problem(small_shape(KvCacheFormat::kFp8, p_block, false, widest), data);
      run(problem);
      const auto out = problem.out(), lse = problem.lse();
      for (std::int64_t b = 0; b < 3; ++b) {
        for (std::int64_t t = 0; t < kQueryTokens; ++t) {
          for (std::int64_t h = 0; h < kHeads; ++h) {
            const bool bad = b == 1 && t == 1 && h == 7;
            const auto row = static_cast<std::size_t>((b * kQueryTokens + t) * kHeads + h);
            EXPECT_EQ(
                std::isnan(lse[static_cast<std::size_t>((b * kHeads + h) * kQueryTokens + t)]),
                bad);
            for (std::size_t d = 0; d < 512; ++d) ASSERT_EQ(std::isnan(out[row * 512 + d]), bad);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace snapmla::test
