// One-hot probes, and NaN: where a single token or element must show up, and nowhere else.
#include <gtest/gtest.h>

#include "agreement/backends.h"
#include "agreement/decode_problem.h"

namespace snapmla::agreement {
namespace {

// A full page whose token `row` alone matches the query: latent dimension `dim` for dim < 512, else
// rope dimension dim - 512. Token t's latent also carries a marker at dimension 5 t.
void probe(ops::OpSet& backend, KvCacheFormat format, PageImage image, int row, int dim) {
  Problem p;
  p.shape.format = format;
  p.shape.image = image;
  p.shape.lengths = {64};
  p.shape.softmax_scale = 1.0f;
  p.batch = p.max_pages = 1;
  p.table = {0};
  p.cache = std::make_unique<Cache>(format, image, false, 1);
  p.latent.resize(64 * 512);
  p.rope.resize(64 * 64);
  p.slots.resize(64);
  std::iota(p.slots.begin(), p.slots.end(), 0);
  for (std::size_t t = 0; t < 64; ++t) p.latent[t * 512 + t * 5] = 1.0f;
  const auto r = static_cast<std::size_t>(row), d = static_cast<std::size_t>(dim);
  (dim < 512 ? p.latent[r * 512 + d] : p.rope[r * 64 + d - 512]) = 4.0f;
  append(backend, p);
  p.q_latent.assign(512, 0.0f);
  p.q_rope.assign(64, 0.0f);
  (dim < 512 ? p.q_latent[d] : p.q_rope[d - 512]) = 32.0f;
  std::mt19937 rng(1);
  prepare_queries(backend, p, rng);
  const Result result = p.decode(backend);
  for (std::size_t i = 0; i < 512; ++i) {
    EXPECT_NEAR(result.out[i], p.latent[r * 512 + i], 0.04f)
        << backend.name() << " row " << row << " dim " << dim << " out " << i;
  }
}

class Probes : public ::testing::TestWithParam<int> {};  // row of the page

TEST_P(Probes, OneHotInEveryBlockOf16) {
  for (ops::OpSet* backend : {&ref_backend(), &cpu_backend()}) {
    for (KvCacheFormat format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16, KvCacheFormat::kF32}) {
      for (PageImage image : {PageImage::kSwizzled128, PageImage::kPlainRows}) {
        for (int block = 0; block < 36; ++block) {
          probe(*backend, format, image, GetParam(), block * 16 + (GetParam() + block) % 16);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(PageRows, Probes, ::testing::Range(0, 64));

// Query token t of seqlen_q, aligned at the bottom right, sees exactly the keys below
// length - seqlen_q + t + 1. The last key it may see dominates it; the next one would dominate
// more.
class CausalProbes : public ::testing::TestWithParam<int> {};  // seqlen_q

TEST_P(CausalProbes, EveryQueryReachesItsOwnKeyAndNoneAfter) {
  const std::int64_t seqlen_q = GetParam();
  for (ops::OpSet* backend : {&ref_backend(), &cpu_backend()}) {
    for (KvCacheFormat format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16, KvCacheFormat::kF32}) {
      for (std::int32_t length : {1, 5, 16, 63, 64, 65, 70, 129}) {
        Problem p;
        p.shape.format = format;
        p.shape.lengths = {length};
        p.shape.seqlen_q = seqlen_q;
        p.shape.heads = 2;
        p.shape.softmax_scale = 1.0f;
        p.batch = 1;
        p.max_pages = 3;
        p.table = {2, 0, 1};
        p.cache = std::make_unique<Cache>(format, p.shape.image, false, 3);
        for (std::int32_t t = 0; t < length; ++t) {
          p.slots.push_back(p.table[static_cast<std::size_t>(t / 64)] * 64 + t % 64);
          std::vector<float> latent(512), rope(64);
          latent[static_cast<std::size_t>(t)] = 4.0f;  // one dimension per token
          rope[0] = static_cast<float>(t);             // later keys weigh more
          p.latent.insert(p.latent.end(), latent.begin(), latent.end());
          p.rope.insert(p.rope.end(), rope.begin(), rope.end());
        }
        append(*backend, p);
        p.q_latent.assign(static_cast<std::size_t>(p.rows() * 512), 0.0f);
        p.q_rope.assign(static_cast<std::size_t>(p.rows() * 64), 0.0f);
        for (std::size_t r = 0; r < static_cast<std::size_t>(p.rows()); ++r) p.q_rope[r * 64] = 16;
        std::mt19937 rng(1);
        prepare_queries(*backend, p, rng);
        const Result result = p.decode(*backend);
        for (std::int64_t t = 0; t < seqlen_q; ++t) {
          const std::int64_t last = length - seqlen_q + t;  // the last key that token t sees
          for (std::int64_t h = 0; h < 2; ++h) {
            for (std::int64_t d = 0; d < 512; ++d) {
              const float got = result.out[static_cast<std::size_t>((t * 2 + h) * 512 + d)];
              EXPECT_NEAR(got, d == last ? 4.0f : 0.0f, 0.02f)
                  << backend->name() << " length " << length << " token " << t << " dim " << d;
            }
            EXPECT_EQ(std::isinf(result.lse[static_cast<std::size_t>(h * seqlen_q + t)]), last < 0);
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(SeqlenQ, CausalProbes, ::testing::Range(1, 17));

// A key with a NaN, and a foreign scale that is not positive, reach exactly the rows that see them.
TEST(DecodeNan, ReachesTheRowsThatSeeTheToken) {
  for (ops::OpSet* backend : {&ref_backend(), &cpu_backend()}) {
    for (float bad : {std::nanf(""), 0.0f, -1.0f}) {
      for (int splits : {1, 2}) {
        Shape shape;
        shape.num_splits = splits;
        shape.heads = 2;
        shape.seqlen_q = 3;
        shape.lengths = {70};
        Problem p = make_problem(shape, 5, *backend);
        p.cache->view().scale_plane(p.table[1])[68 - 64] = bad;
        const Result result = p.decode(*backend);
        for (std::size_t t = 0; t < 3; ++t) {
          for (std::size_t h = 0; h < 2; ++h) {
            const bool sees = t >= 1;  // token t sees keys below 68 + t
            EXPECT_EQ(std::isnan(result.out[(t * 2 + h) * 512 + 9]), sees) << bad << " token " << t;
            EXPECT_EQ(std::isnan(result.lse[h * 3 + t]), sees) << bad << " token " << t;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace snapmla::agreement
