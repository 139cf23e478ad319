// The naive fp64 model (tests/support) against transformers' goldens, and the engine in f32 against
// the naive model: on the oracles, on the shipped model and on random configurations.
#include <gtest/gtest.h>

#include "engine/oracle_files.h"
#include "engine/step_model.h"
#include "snapmla/snapmla.h"
#include "support/naive_model.h"
#include "support/random_checkpoint.h"

namespace snapmla {
namespace {

using oracle::Distance;
using oracle::kOracles;
using oracle::NaiveModel;
using oracle::NaiveResult;
using oracle::StepModel;

constexpr double kBound = 1e-5;  // relative L2 per tensor

double distance(const oracle::Rows& got, const TensorView& want, std::size_t start = 0) {
  Distance d;
  for (std::int64_t t = 0; t < want.dim(0); ++t) {
    const oracle::Row& row = got.at(start + static_cast<std::size_t>(t));
    EXPECT_EQ(static_cast<std::int64_t>(row.size()), want.dim(1));
    d.add(row.data(), want.row<float>(t), want.dim(1));
  }
  return d.relative();
}

double distance(const std::vector<float>& got, const oracle::Rows& want) {
  Distance d;
  std::size_t at = 0;
  EXPECT_EQ(got.size(), want.size() * want[0].size());
  for (const oracle::Row& row : want) {
    d.add(&got.at(at), row.data(), static_cast<std::int64_t>(row.size()));
    at += row.size();
  }
  return d.relative();
}

class Naive : public testing::TestWithParam<std::string> {};

TEST_P(Naive, MatchesTransformers) {
  const std::string name = GetParam();
  const NaiveModel naive(kOracles / name / "config.json", oracle::weights_of(name));
  const model::SafetensorsFile golden(kOracles / name / "golden.safetensors");
  const auto& t = golden.tensors();
  for (const std::string which : {"len1", "len17", "len130", "pos100k"}) {
    const auto ids = oracle::ids_of(t.at(which + ".ids"));
    const auto positions = oracle::ids_of(t.at(which + ".positions"));
    const NaiveResult r = naive.forward(ids, {positions.begin(), positions.end()});
    const auto start = static_cast<std::size_t>(oracle::ids_of(t.at(which + ".logits_start"))[0]);
    EXPECT_LT(distance(r.logits, t.at(which + ".logits"), start), kBound) << which;
    if (which != "len17") continue;
    EXPECT_LT(distance(r.latent, t.at("layer0.c")), kBound);
    EXPECT_LT(distance(r.k_rope, t.at("layer0.k_rope")), kBound);
    for (std::size_t layer = 0; layer < r.hidden.size(); ++layer) {
      const std::string number = std::to_string(layer);
      EXPECT_LT(distance(r.hidden[layer], t.at("len17.hidden." + number)), kBound) << number;
      if (!t.contains("len17.router." + number + ".ids")) continue;
      const TensorView want_ids = t.at("len17.router." + number + ".ids");
      const TensorView want = t.at("len17.router." + number + ".weights");
      for (std::size_t token = 0; token < ids.size(); ++token) {
        std::vector<std::pair<int, double>> chosen;
        for (std::size_t k = 0; k < r.ids[layer].at(token).size(); ++k)
          chosen.emplace_back(r.ids[layer][token][k], r.weights[layer][token][k]);
        std::sort(chosen.begin(), chosen.end());
        for (std::size_t k = 0; k < chosen.size(); ++k) {
          const auto row = static_cast<std::int64_t>(token);
          EXPECT_EQ(chosen[k].first, want_ids.row<std::int32_t>(row)[k]);
          EXPECT_NEAR(chosen[k].second / want.row<float>(row)[k], 1, 1e-5);
        }
      }
    }
  }
}

// Prefill and absorbed decode (one and three tokens at a time), every position.
TEST_P(Naive, EngineInF32Matches) {
  const std::string name = GetParam();
  const NaiveModel naive(kOracles / name / "config.json", oracle::weights_of(name));
  const model::SafetensorsFile golden(kOracles / name / "golden.safetensors");
  StepModel engine(oracle::checkpoint_dir(name), KvCacheFormat::kF32, "cpu");
  for (const std::string which : {"len1", "len17", "len130"}) {
    const auto ids = oracle::ids_of(golden.tensors().at(which + ".ids"));
    const oracle::Rows want = naive.forward(ids).logits;
    EXPECT_LT(distance(engine.logits(ids, ids.size()), want), kBound) << which;
    if (ids.size() < 2) continue;
    const std::size_t prompt = ids.size() > 100 ? 100 : 1;
    EXPECT_LT(distance(engine.logits(ids, prompt), want), kBound) << which << " decoded";
    EXPECT_LT(distance(engine.logits(ids, prompt, 3), want), kBound) << which << " three at a time";
  }
}

INSTANTIATE_TEST_SUITE_P(Oracles, Naive, testing::ValuesIn(oracle::kNames),
                         [](const auto& info) { return info.param; });

class RandomModel : public testing::TestWithParam<unsigned> {};

TEST_P(RandomModel, EngineInF32MatchesNaive) {
  const auto dir =
      std::filesystem::path(testing::TempDir()) / ("snapmla_random_" + std::to_string(GetParam()));
  SCOPED_TRACE(oracle::write_random_checkpoint(GetParam(), dir));
  const NaiveModel naive(dir / "config.json", dir);
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < 70; ++i)
    ids.push_back(
        static_cast<std::int32_t>((i * i * 31 + i * 7 + GetParam()) % naive.vocab_size()));
  const oracle::Rows want = naive.forward(ids).logits;
  for (const std::string backend : {"cpu", "ref"}) {
    StepModel engine(dir, KvCacheFormat::kF32, backend);
    EXPECT_LT(distance(engine.logits(ids, 60, 4), want), kBound) << backend;
  }
  std::filesystem::remove_all(dir);
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomModel, testing::Range(0u, 40u));

// The five short prompts of O8: the naive model repeats the goldens, and the engine's decode path
// repeats the naive model on prompt and greedy continuation.
TEST(NaiveShippedModel, MatchesTransformersAndTheEngine) {
  const std::filesystem::path dir = SNAPMLA_SOURCE_DIR "/models/snapmla-20m";
  const NaiveModel naive(dir / "config.json", dir);
  const model::SafetensorsFile golden(kOracles / "o8" / "golden.safetensors");
  const auto& t = golden.tensors();
  const auto all = oracle::ids_of(t.at("prompts.ids")),
             offsets = oracle::ids_of(t.at("prompts.offsets"));
  StepModel engine(dir, KvCacheFormat::kF32, "cpu");
  int compared = 0;
  for (std::int64_t i = 0; i < 8; ++i) {
    const auto at = static_cast<std::size_t>(i);
    std::vector<std::int32_t> ids(all.begin() + offsets[at], all.begin() + offsets[at + 1]);
    if (ids.size() > 80) continue;
    const std::size_t prompt = ids.size();
    const std::int32_t* greedy = t.at("greedy.ids").row<std::int32_t>(i);
    ids.insert(ids.end(), greedy, greedy + 24);
    const oracle::Rows want = naive.forward(ids).logits;
    Distance d;
    d.add(want[prompt - 1].data(), t.at("logits").row<float>(i), t.at("logits").dim(1));
    EXPECT_LT(d.relative(), kBound) << "prompt " << i;
    EXPECT_LT(distance(engine.logits(ids, prompt), want), kBound) << "prompt " << i;
    ++compared;
  }
  EXPECT_GE(compared, 4);
}

}  // namespace
}  // namespace snapmla
