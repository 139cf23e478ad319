// Logits far from zero: where the FP8 kernel's exponentials leave f32 and it goes on by logits,
// from an item's first tile on or in its midst, for all rows or some.
#include <algorithm>
#include <cstring>

#include "cuda/cuda_test.h"

namespace snapmla::test {
namespace {

BFloat16 narrow(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return BFloat16{static_cast<std::uint16_t>((bits + 0x8000u) >> 16)};
}

struct Offsets {
  const char* name;
  // Added to the logits, natural log.
  float (*of_token)(std::int64_t request, std::int64_t token);
  float (*of_head)(int head) = [](int) { return 1.0f; };  // how much of it the head sees
  float key_scale = 1.0f;  // of keys, and so of tokens' scales; of queries its inverse
  float spread = 1.0f;     // of what is random in the logits
};

const Offsets kOffsets[] = {
    {"near zero", [](std::int64_t, std::int64_t) { return 0.0f; }},
    {"all high", [](std::int64_t, std::int64_t) { return 80.0f; }},
    {"all low", [](std::int64_t, std::int64_t) { return -80.0f; }},
    {"far above f32", [](std::int64_t, std::int64_t) { return 500.0f; }},
    {"far below f32", [](std::int64_t, std::int64_t) { return -500.0f; }},
    {"rises", [](std::int64_t, std::int64_t token) { return token < 200 ? 0.0f : 90.0f; }},
    {"rises beyond f32",
     [](std::int64_t, std::int64_t token) { return token < 200 ? 0.0f : 300.0f; }},
    {"rises twice",
     [](std::int64_t, std::int64_t t) { return t < 200   ? 0.0f
                                               : t < 450 ? 100.0f
                                                         : 160.0f; }},
    {"rises at the end",
     [](std::int64_t, std::int64_t token) { return token < 640 ? 10.0f : 70.0f; }},
    {"falls", [](std::int64_t, std::int64_t token) { return token < 300 ? 0.0f : -120.0f; }},
    {"one head in 16 high", [](std::int64_t, std::int64_t) { return 90.0f; },
     [](int head) { return head % 16 == 3 ? 1.0f : 0.0f; }},
    {"one head of all low", [](std::int64_t, std::int64_t) { return -90.0f; },
     [](int head) { return head == 37 ? 1.0f : 0.0f; }},
    {"heads far apart", [](std::int64_t, std::int64_t) { return 128.0f; },
     [](int head) { return static_cast<float>(head % 5 - 2); }},
    // Token scales of about 2^-57 and logits of 85 (2^122.6), give or take little: the largest
    // s 2^logit of a row is about 2^66, where the exponentials are good, and no 2^logit is beyond
    // f32, but their sum, which is l, is.
    {"l alone beyond f32", [](std::int64_t, std::int64_t) { return 85.0f; },
     [](int) { return 1.0f; }, 0x1p-50f, 0.03f},
    {"l alone beyond f32 later",
     [](std::int64_t, std::int64_t token) { return token < 300 ? 0.0f : 85.0f; },
     [](int) { return 1.0f; }, 0x1p-50f, 0.03f},
};

const Offsets kSplitOffsets[] = {
    {"rises between splits",
     [](std::int64_t, std::int64_t token) { return token < 5000 ? 0.0f : 100.0f; }},
    {"falls between splits",
     [](std::int64_t, std::int64_t token) { return token < 4096 ? 100.0f : -30.0f; }},
    {"splits far apart",
     [](std::int64_t, std::int64_t token) {
       return token < 4096 ? -60.0f : token < 8192 ? 50.0f : 0.0f;
     }},
};

gpu::Problem problem_of(const Offsets& offsets, int heads, int seqlen_q, int p_block,
                        std::vector<std::int32_t> lengths, bool deterministic) {
  gpu::ProblemShape s;
  s.heads = heads;
  s.seqlen_q = seqlen_q;
  s.p_block = p_block;
  s.lengths = std::move(lengths);
  s.softmax_scale = 0.125f;
  s.out = DType::kF32;
  s.deterministic = deterministic;  // then 64 rows a CTA
  s.unused_pages = 2;
  std::vector<std::pair<std::int64_t, std::int64_t>> tokens;  // of all requests, one by one
  for (std::size_t b = 0; b < s.lengths.size(); ++b)
    for (std::int64_t t = 0; t < s.lengths[b]; ++t)
      tokens.emplace_back(static_cast<std::int64_t>(b), t);
  // Nearly normal, from a counter: sums of four bytes.
  const auto normal = [](std::size_t count, std::uint64_t seed, float scale = 1.0f) {
    std::vector<BFloat16> x(count);
    for (std::size_t k = 0; k < count; ++k) {
      std::uint64_t h = (k + 1) * 0x9E3779B97F4A7C15u ^ seed * 0xD1B54A32D192ED03u;
      h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9u;
      h ^= h >> 27;
      const auto byte = [h](int b) { return static_cast<int>(h >> 8 * b & 0xff); };
      x[k] = narrow(static_cast<float>(byte(2) + byte(3) + byte(4) + byte(5) - 510) * 0.00677f *
                    scale);
    }
    return x;
  };
  const auto to_device = [](BFloat16* to, const std::vector<BFloat16>& from) {
    SNAPMLA_CUDA_CHECK(cudaMemcpy(to, from.data(), from.size() * 2, cudaMemcpyHostToDevice));
  };
  gpu::ProblemData data;
  data.keys = [&](BFloat16* latent, BFloat16* rope, std::int64_t first, std::int64_t count,
                  cudaStream_t) {
    const auto n = static_cast<std::size_t>(count);
    auto l = normal(n * 512, 7 + static_cast<std::uint64_t>(first), offsets.key_scale);
    auto r = normal(n * 64, 8, offsets.key_scale);
    for (std::size_t i = 0; i < n; ++i) {
      const auto& [request, token] = tokens[static_cast<std::size_t>(first) + i];
      r[i * 64] = narrow(offsets.of_token(request, token) * offsets.key_scale);
    }
    to_device(latent, l);
    to_device(rope, r);
  };
  data.queries = [&](BFloat16* latent, BFloat16* rope, std::int64_t rows, cudaStream_t) {
    const auto n = static_cast<std::size_t>(rows);
    const float scale = 1.0f / offsets.key_scale;
    auto l = normal(n * 512, 9, scale * offsets.spread);
    auto r = normal(n * 64, 10, scale * offsets.spread);
    for (std::size_t i = 0; i < n; ++i)
      r[i * 64] = narrow(
          8.0f * offsets.of_head(static_cast<int>(static_cast<std::int64_t>(i) % s.heads)) * scale);
    to_device(latent, l);
    to_device(rope, r);
  };
  return gpu::Problem(s, data);
}

void expect_right(const Offsets& offsets, int heads, int seqlen_q, int p_block,
                  std::vector<std::int32_t> lengths, bool deterministic) {
  SCOPED_TRACE(std::string(offsets.name) + ", " + std::to_string(heads) + " heads x " +
               std::to_string(seqlen_q) + ", p_block " + std::to_string(p_block));
  gpu::Problem problem =
      problem_of(offsets, heads, seqlen_q, p_block, std::move(lengths), deterministic);
  if (deterministic && enough_sms()) {
    ASSERT_FALSE(tiles_of_16_rows(problem));
  }
  expect_agreement(problem, gpu::sample_rows(problem.reference(), 300, 3), 1.5e-2, 8e-2);
}

class CudaRange : public CudaTest, public ::testing::WithParamInterface<Offsets> {};
INSTANTIATE_TEST_SUITE_P(All, CudaRange, ::testing::ValuesIn(kOffsets));

TEST_P(CudaRange, AgreesWithFp64) {
  for (const int p_block : {128, 64}) {
    expect_right(GetParam(), 64, 1, p_block, {1500, 700, 130, 1, 300}, true);
    expect_right(GetParam(), 128, 2, p_block, {700, 1300}, true);
    expect_right(GetParam(), 64, 1, p_block, std::vector<std::int32_t>(300, 260), false);
    expect_right(GetParam(), 128, 1, p_block, {1500, 700}, false);
  }
}

class CudaRangeOfSplits : public CudaTest {};

// Three splits, which the kernel merges, and five, which combine does: some by exponentials, some
// by logits.
TEST_F(CudaRangeOfSplits, AgreeWithFp64) {
  for (const Offsets& offsets : kSplitOffsets)
    expect_right(offsets, 64, 1, 128, {9000, 20000}, true);
}

class CudaRangeOfOthers : public CudaTest {};

// In deterministic plans a row's bits do not depend on its batch: not on a request before it in the
// same part whose logits are out of range, either.
TEST_F(CudaRangeOfOthers, OtherRequestsOutOfRangeChangeNoBit) {
  const Offsets kNone{"none", [](std::int64_t, std::int64_t) { return 0.0f; }};
  const Offsets kEven{"even requests", [](std::int64_t request, std::int64_t token) {
                        return request % 2 == 0 && token >= 130 ? 90.0f : 0.0f;
                      }};
  constexpr int kRequests = 301;
  std::vector<std::vector<float>> outs, lses;
  for (const Offsets& offsets : {kNone, kEven}) {
    gpu::Problem problem =
        problem_of(offsets, 64, 1, 128, std::vector<std::int32_t>(kRequests, 400), true);
    run(problem);
    outs.push_back(problem.out());
    lses.push_back(problem.lse());
  }
  const std::size_t per_request = outs[0].size() / kRequests;
  for (int b = 0; b < kRequests; ++b) {
    const auto at = static_cast<std::ptrdiff_t>(static_cast<std::size_t>(b) * per_request);
    const auto end = at + static_cast<std::ptrdiff_t>(per_request);
    const bool same =
        std::equal(outs[0].begin() + at, outs[0].begin() + end, outs[1].begin() + at) &&
        std::equal(lses[0].begin() + b * 64, lses[0].begin() + b * 64 + 64,
                   lses[1].begin() + b * 64);
    EXPECT_EQ(same, b % 2 == 1) << "request " << b;
  }
}

class CudaSmallRange : public CudaTest {};

TEST_F(CudaSmallRange, ExponentialsStopInTheMidst) {
  expect_right(kOffsets[6], 64, 1, 128, {700, 300, 200}, true);
}

}  // namespace
}  // namespace snapmla::test
