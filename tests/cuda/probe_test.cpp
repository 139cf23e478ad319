// One-hot probes: for every token row of two and a half pages, every head and every one of the 576
// dimensions, a query that sees exactly one token. The output must be that token's latent, in
// place: a wrong row, dimension, head or swizzle anywhere shows.
#include <cstring>

#include "cuda/cuda_test.h"

namespace snapmla::test {
namespace {

constexpr int kTokens = 130;  // two pages and two tokens: a tile of two pages and a tail
constexpr int kHeads = 128;

// e4m3 codes with a unit in the last place of 7% or more between them, as multiples of the largest.
float pattern(std::int64_t token, int dim) {
  const std::uint32_t h = static_cast<std::uint32_t>(token * 2654435761 + dim * 40503) >> 7;
  return 8.0f * static_cast<float>(14 - h % 7) / 14.0f * ((h / 7) % 2 == 0 ? 1.0f : -1.0f);
}

BFloat16 narrow(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return BFloat16{static_cast<std::uint16_t>((bits + 0x8000u) >> 16)};
}

// Request r of `requests` from `first` on: token r is loud (pattern, rope 8), the others are quiet
// (a tenth of theirs). Head h asks for dimension (h + shift) mod 576 with the sign that the loud
// token has there.
void probe(KvCacheFormat format, PageImage image, int p_block, int heads, int seqlen_q, int shift,
           int first_request = 0, int requests = kTokens) {
  SCOPED_TRACE(std::string(to_string(format)) + (image == PageImage::kPlainRows ? " plain" : "") +
               " heads " + std::to_string(heads) + " shift " + std::to_string(shift));
  gpu::ProblemShape s;
  s.format = format;
  s.image = readable(image);
  s.p_block = p_block;
  s.heads = heads;
  s.seqlen_q = seqlen_q;
  s.lengths.assign(static_cast<std::size_t>(requests), kTokens);
  s.softmax_scale = 1.0f;
  s.out = DType::kF32;
  s.deterministic = shift % 2 == 0;
  const auto loud = [](std::int64_t request, std::int64_t token) { return token == request; };
  gpu::ProblemData data;
  data.keys = [&](BFloat16* latent, BFloat16* rope, std::int64_t first, std::int64_t count,
                  cudaStream_t) {
    std::vector<BFloat16> l(static_cast<std::size_t>(count * 512)),
        r(static_cast<std::size_t>(count * 64));
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t request = first_request + (first + i) / kTokens,
                         token = (first + i) % kTokens;
      const float size = loud(request, token) ? 1.0f : 0.1f;
      for (int d = 0; d < 512; ++d) {
        l[static_cast<std::size_t>(i * 512 + d)] = narrow(size * pattern(token, d));
      }
      for (int d = 0; d < 64; ++d) {
        r[static_cast<std::size_t>(i * 64 + d)] = narrow(size * pattern(token, 512 + d));
      }
    }
    SNAPMLA_CUDA_CHECK(cudaMemcpy(latent, l.data(), l.size() * 2, cudaMemcpyHostToDevice));
    SNAPMLA_CUDA_CHECK(cudaMemcpy(rope, r.data(), r.size() * 2, cudaMemcpyHostToDevice));
  };
  data.queries = [&](BFloat16* latent, BFloat16* rope, std::int64_t rows, cudaStream_t) {
    std::vector<BFloat16> l(static_cast<std::size_t>(rows * 512)),
        r(static_cast<std::size_t>(rows * 64));
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t request = first_request + i / (s.heads * s.seqlen_q);
      const int dim = static_cast<int>((i % (s.heads * s.seqlen_q) + shift) % 576);
      const float value = pattern(request, dim) > 0 ? 64.0f : -64.0f;
      if (dim < 512) {
        l[static_cast<std::size_t>(i * 512 + dim)] = narrow(value);
      } else {
        r[static_cast<std::size_t>(i * 64 + dim - 512)] = narrow(value);
      }
    }
    SNAPMLA_CUDA_CHECK(cudaMemcpy(latent, l.data(), l.size() * 2, cudaMemcpyHostToDevice));
    SNAPMLA_CUDA_CHECK(cudaMemcpy(rope, r.data(), r.size() * 2, cudaMemcpyHostToDevice));
  };
  gpu::Problem problem(s, data);
  if (enough_sms()) {
    ASSERT_EQ(tiles_of_16_rows(problem), requests < kTokens);
  }
  run(problem);
  const auto out = problem.out();
  int wrong = 0;
  for (std::int64_t i = 0; i < s.rows() && wrong < 5; ++i) {
    const std::int64_t per_request = s.heads * s.seqlen_q,
                       request = first_request + i / per_request;
    const std::int64_t query_token = i % per_request / s.heads;
    // With several query tokens, the loud token is out of sight of the early ones at the very end.
    if (request > kTokens - s.seqlen_q + query_token) continue;
    for (int d = 0; d < 512; ++d) {
      const float got = out[static_cast<std::size_t>(i * 512 + d)], want = pattern(request, d);
      if (!(std::fabs(got - want) <= 0.02f * std::fabs(want))) {
        ADD_FAILURE() << "token row " << request << ", query row " << i % per_request << ", dim "
                      << d << ": got " << got << ", expected " << want;
        ++wrong;
        break;
      }
    }
  }
}

TEST_F(CudaTest, OneHotInEveryRowAndDimension) {
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const auto image : {PageImage::kSwizzled128, PageImage::kPlainRows}) {
      for (int shift = 0; shift < 576; shift += kHeads) probe(format, image, 64, kHeads, 1, shift);
    }
  }
  for (int shift = 0; shift < 576; shift += kHeads) {
    probe(KvCacheFormat::kFp8, PageImage::kSwizzled128, 128, kHeads, 1, shift);
  }
}

TEST_F(CudaTest, OneHotForEveryNumberOfRows) {
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const auto& [heads, seqlen_q] : std::vector<std::pair<int, int>>{
             {16, 1}, {32, 1}, {64, 1}, {24, 1}, {96, 1}, {128, 2}, {16, 3}, {5, 16}}) {
      for (int shift = 0; shift < 576; shift += 144) {
        probe(format, PageImage::kSwizzled128, 64, heads, seqlen_q, shift);
      }
    }
  }
}

// Requests so few that the FP8 kernel takes 16 rows a CTA.
TEST_F(CudaTest, OneHotInTilesOf16Rows) {
  constexpr int kFew = 13;
  for (const auto& [heads, seqlen_q] :
       std::vector<std::pair<int, int>>{{128, 1}, {64, 1}, {96, 1}, {24, 1}, {32, 3}}) {
    for (int shift = 1; shift < 576; shift += 144) {  // odd: a balanced plan
      for (int first = 0; first < kTokens; first += kFew)
        probe(KvCacheFormat::kFp8, PageImage::kSwizzled128, 64, heads, seqlen_q, shift, first,
              kFew);
    }
  }
}

}  // namespace
}  // namespace snapmla::test
