// Every scheme, element by element, against tests/analysis/plain.h; errors that are known.
#include "analysis/schemes.h"

#include <gtest/gtest.h>

#include "analysis/plain.h"

namespace snapmla::analysis {
namespace {

LayerRange range_of(const plain::Text& x) {
  LayerRange range;
  range.latent = static_cast<float>(plain::amax(x, true, 0, x.tokens, 0, plain::kLatent));
  range.rope = static_cast<float>(plain::amax(x, false, 0, x.tokens, 0, plain::kRope));
  for (int c = 0; c < plain::kLatent; ++c)
    range.latent_channel.push_back(static_cast<float>(plain::amax(x, true, 0, x.tokens, c, c + 1)));
  for (int c = 0; c < plain::kRope; ++c)
    range.rope_channel.push_back(static_cast<float>(plain::amax(x, false, 0, x.tokens, c, c + 1)));
  return range;
}

void expect_equal(const plain::Text& x, Scheme scheme, Part part) {
  const bool latent = part == Part::kLatent;
  const int width = latent ? plain::kLatent : plain::kRope;
  const LayerRange range = range_of(x);
  for (std::int64_t begin = 0; begin < x.tokens; begin += plain::kPage) {
    const Rows rows{std::min<std::int64_t>(plain::kPage, x.tokens - begin),
                    x.latent.data() + begin * plain::kLatent, x.rope.data() + begin * plain::kRope};
    std::vector<float> out(static_cast<std::size_t>(rows.count * width));
    const Tally tally = apply(scheme, part, rows, range, out.data());
    std::int64_t clipped = 0, flushed = 0;
    for (std::int64_t t = 0; t < rows.count; ++t) {
      for (int c = 0; c < width; ++c) {
        const double want = plain::stored(x, scheme, latent, begin + t, c);
        ASSERT_EQ(out[static_cast<std::size_t>(t * width + c)], want)
            << name_of(scheme) << " token " << begin + t << " channel " << c;
        const double value = latent ? x.l(begin + t, c) : x.r(begin + t, c);
        const double s = plain::scale(x, scheme, latent, begin + t, c);
        if (s == 0) continue;
        clipped += std::fabs(value) / s >= 464;
        flushed += value != 0 && want == 0;
      }
    }
    EXPECT_EQ(tally.clipped, clipped) << name_of(scheme);
    EXPECT_EQ(tally.flushed, flushed) << name_of(scheme);
  }
}

TEST(Schemes, EveryElementIsWhatTheRuleSays) {
  plain::Text x = plain::text(130, 1, 2);
  for (int c = 0; c < plain::kLatent; ++c) x.latent[static_cast<std::size_t>(3 * 512 + c)] = 0;
  for (Scheme s : kLatentSchemes) expect_equal(x, s, Part::kLatent);
  for (Scheme s : kRopeSchemes) expect_equal(x, s, Part::kRope);
}

TEST(Schemes, ScaleOneClipsWhatIsLargeAndFlushesWhatIsSmall) {
  std::vector<float> latent(512, 1.0f), rope(64);
  latent[0] = 1000;      // clipped to 448
  latent[1] = 463;       // rounds to 448
  latent[2] = 0x1p-10f;  // ties to zero
  latent[3] = 0x1.01p-10f;
  const LayerRange range{1000, 0, std::vector<float>(512, 1000.0f), std::vector<float>(64)};
  std::vector<float> out(512);
  const Tally tally =
      apply(Scheme::kTensorOne, Part::kLatent, {1, latent.data(), rope.data()}, range, out.data());
  EXPECT_EQ(out[0], 448);
  EXPECT_EQ(out[1], 448);
  EXPECT_EQ(out[2], 0);
  EXPECT_EQ(out[3], 0x1p-9f);
  EXPECT_EQ(out[4], 1);
  EXPECT_EQ(tally.clipped, 1);
  EXPECT_EQ(tally.flushed, 1);
}

// The error of e4m3 on normal rows: 2.6% (simulated apart from this program), of bf16 1/16 of it.
TEST(Schemes, NormalRowsLoseWhatTheFormatCosts) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  plain::Text x;
  x.tokens = 64;
  for (int i = 0; i < 64 * 512; ++i) x.latent.push_back(normal(random));
  for (int i = 0; i < 64 * 64; ++i) x.rope.push_back(normal(random));
  const LayerRange range = range_of(x);
  const Rows rows{64, x.latent.data(), x.rope.data()};
  for (Scheme s : kLatentSchemes) {
    std::vector<float> out(64 * 512);
    apply(s, Part::kLatent, rows, range, out.data());
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      error += std::pow(static_cast<double>(out[i]) - x.latent[i], 2);
      norm += static_cast<double>(x.latent[i]) * x.latent[i];
    }
    const double relative = std::sqrt(error / norm);
    if (s == Scheme::kBf16) {
      EXPECT_NEAR(relative, 0.00166, 1e-4);
    } else {
      EXPECT_NEAR(relative, 0.026, 0.0012) << name_of(s);
    }
  }
}

TEST(Schemes, EachHasItsOwnName) {
  std::vector<std::string> names;
  for (Scheme s : kLatentSchemes) names.push_back(name_of(s));
  names.push_back(name_of(Scheme::kRopeOverScale));
  std::ranges::sort(names);
  EXPECT_EQ(std::ranges::unique(names).begin(), names.end());
}

}  // namespace
}  // namespace snapmla::analysis
