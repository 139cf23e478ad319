// What the probe takes from a model, against the naive fp64 model and against the cache itself.
#include "analysis/cache_probe.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "engine/backend_factory.h"
#include "kv_cache/paged_cache.h"
#include "model/config.h"
#include "model/forward.h"
#include "model/weights.h"
#include "ops/ops.h"
#include "snapmla/error.h"
#include "support/naive_model.h"
#include "support/source_dir.h"

namespace snapmla::analysis {
namespace {

std::filesystem::path oracle(const std::string& name) {
  return source_dir() / "tests/oracles" / name;
}
std::string shipped() { return (source_dir() / "models/snapmla-20m").string(); }

std::vector<std::int32_t> random_ids(std::size_t n, std::int32_t vocab) {
  std::mt19937 random(11);
  std::vector<std::int32_t> ids(n);
  for (auto& id : ids) id = static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab));
  return ids;
}

CacheProbeOptions options_for(const std::string& dir, const std::string& backend = "cpu") {
  CacheProbeOptions o;
  o.model_dir = dir;
  o.backend = backend;
  o.threads = 2;
  return o;
}

class Probe : public testing::TestWithParam<std::tuple<std::string, std::string>> {};

// Rows, scores of the sampled queries and values of the sampled heads, layer 0: o1 and o3 have
// q_lora, o2 has not; all three have YaRN, the head sizes differ.
TEST_P(Probe, TakesTheModelsOwnNumbers) {
  const auto& [name, backend] = GetParam();
  const std::filesystem::path dir = oracle(name);
  const std::vector<std::int32_t> ids = random_ids(70, 256);
  CacheProbeOptions options = options_for(dir.string(), backend);
  options.query_positions = 5;
  options.heads = 2;
  const CacheProbe probe(options, ids);
  const LayerSource source = probe.layer(0);
  const oracle::NaiveModel naive(dir / "config.json", dir);
  const oracle::NaiveResult want = naive.forward(ids);

  std::vector<float> latent(70 * 512), rope(70 * 64);
  source.rows(0, 70, latent.data(), rope.data());
  for (std::size_t t = 0; t < 70; ++t) {
    for (std::size_t c = 0; c < 512; ++c) ASSERT_NEAR(latent[t * 512 + c], want.latent[t][c], 1e-4);
    for (std::size_t c = 0; c < 64; ++c) ASSERT_NEAR(rope[t * 64 + c], want.k_rope[t][c], 1e-4);
  }

  const auto heads = static_cast<std::int64_t>(want.scores[0].size());
  const std::vector<std::int64_t> chosen = evenly_spaced(2, heads);
  ASSERT_EQ(source.query_positions.size(), 5 * chosen.size());
  double scores_seen = 0;
  for (std::size_t i = 0; i < source.query_positions.size(); ++i) {
    const auto position = static_cast<std::size_t>(source.query_positions[i]);
    const auto& row = want.scores[position][static_cast<std::size_t>(chosen[i % chosen.size()])];
    for (std::size_t j = 0; j <= position; ++j) {
      double score = 0;
      for (std::size_t c = 0; c < 512; ++c)
        score += static_cast<double>(source.query_latent[i * 512 + c]) * latent[j * 512 + c];
      for (std::size_t c = 0; c < 64; ++c)
        score += static_cast<double>(source.query_rope[i * 64 + c]) * rope[j * 64 + c];
      ASSERT_NEAR(score * source.softmax_scale, row[j], 1e-4 * (1 + std::fabs(row[j])));
      scores_seen += std::fabs(row[j]);
    }
  }
  EXPECT_GT(scores_seen, 1);

  const std::size_t outputs = source.value_weight.size() / 512, v_dim = outputs / chosen.size();
  for (std::size_t o = 0; o < outputs; ++o) {
    const std::size_t head = static_cast<std::size_t>(chosen[o / v_dim]);
    double value = 0;
    for (std::size_t c = 0; c < 512; ++c)
      value += static_cast<double>(source.value_weight[o * 512 + c]) * latent[69 * 512 + c];
    ASSERT_NEAR(value, want.values[69][head * v_dim + o % v_dim], 1e-4);
  }
}

INSTANTIATE_TEST_SUITE_P(Oracles, Probe,
                         testing::Combine(testing::Values("o1", "o2", "o3"),
                                          testing::Values("cpu", "ref")));

// Layer 0 sees no cache: there an FP8 cache must hold, bit for bit, what the schemes say of the
// probe's rows. Chunks longer than one forward.
TEST(CacheProbe, ItsRowsQuantisedAreTheFp8CachesBitForBit) {
  const std::vector<std::int32_t> ids = random_ids(600, 2048);
  const CacheProbe probe(options_for(shipped()), ids);
  const LayerSource source = probe.layer(0);

  const ModelConfig config = model::load_config(shipped());
  const auto ops = engine::make_backend("cpu", 2);
  const model::Checkpoint checkpoint = model::Checkpoint::open(shipped());
  const model::ModelWeights weights = model::load_weights(checkpoint, config);
  PagedCache cache(KvCacheFormat::kFp8, config.num_hidden_layers, 10, ops->memory());
  model::Forward forward(config, weights, *ops, cache, 600, ScaleMode::kAmax, DecodeNumerics{});
  SequencePages pages(cache);
  ASSERT_TRUE(pages.extend(600));
  forward.prefill(pages, 0, ids);
  std::vector<float> latent(600 * 512), rope(600 * 64);
  ops::fetch_dequant(
      *ops, {cache.layer(0), TensorView::of(pages.table().data(), {10}), 0, 600,
             TensorView::of(latent.data(), {600, 512}), TensorView::of(rope.data(), {600, 64})});

  std::vector<float> page_latent(64 * 512), page_rope(64 * 64), out(64 * 512);
  for (std::int64_t at = 0; at < 600; at += 64) {
    const std::int64_t n = std::min<std::int64_t>(64, 600 - at);
    source.rows(at, at + n, page_latent.data(), page_rope.data());
    const Rows rows{n, page_latent.data(), page_rope.data()};
    apply(Scheme::kToken, Part::kLatent, rows, {}, out.data());
    EXPECT_EQ(std::memcmp(out.data(), &latent[static_cast<std::size_t>(at * 512)],
                          static_cast<std::size_t>(n) * 512 * 4),
              0);
    apply(Scheme::kRopeOverScale, Part::kRope, rows, {}, out.data());
    EXPECT_EQ(std::memcmp(out.data(), &rope[static_cast<std::size_t>(at * 64)],
                          static_cast<std::size_t>(n) * 64 * 4),
              0);
  }
}

TEST(CacheProbe, Bf16RowsAreRounded) {
  const std::vector<std::int32_t> ids = random_ids(5, 2048);
  CacheProbeOptions options = options_for(shipped());
  options.rows = KvCacheFormat::kBf16;
  const CacheProbe probe(options, ids);
  std::vector<float> latent(5 * 512), rope(5 * 64);
  probe.layer(4).rows(0, 5, latent.data(), rope.data());
  for (float x : latent) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    ASSERT_EQ(bits & 0xffffu, 0u);
  }
}

TEST(CacheProbe, SamplesAreEvenAndEndAtTheLast) {
  EXPECT_EQ(evenly_spaced(4, 100), (std::vector<std::int64_t>{24, 49, 74, 99}));
  EXPECT_EQ(evenly_spaced(8, 3), (std::vector<std::int64_t>{0, 1, 2}));
  EXPECT_EQ(evenly_spaced(1, 7), (std::vector<std::int64_t>{6}));
  EXPECT_TRUE(evenly_spaced(3, 0).empty());
}

TEST(CacheProbe, RefusesWhatItCannotRun) {
  const auto message = [](const CacheProbeOptions& options, const std::vector<std::int32_t>& ids) {
    try {
      CacheProbe probe(options, ids);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("nothing");
  };
  EXPECT_EQ(message(options_for(shipped()), {}), "tokens: got none, accepted is at least 1");
  EXPECT_EQ(message(options_for(shipped()), {1, 5000}),
            "ids: got token id 5000, accepted is 0 to 2047");
  EXPECT_EQ(message(options_for(shipped()), std::vector<std::int32_t>(16385, 1)),
            "tokens: got 16385, accepted are at most the 16384 of the model's context");
  CacheProbeOptions fp8 = options_for(shipped());
  fp8.rows = KvCacheFormat::kFp8;
  EXPECT_EQ(message(fp8, {1}), "rows: got fp8, accepted is f32 or bf16, before quantisation");
}

}  // namespace
}  // namespace snapmla::analysis
