// The engine on the device: tiny checkpoints of every kind and the shipped model against
// transformers, and against the cpu backend, step by step.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

#include "cuda/cuda_test.h"
#include "engine/backend_factory.h"
#include "engine/oracle_files.h"
#include "engine/shipped_model.h"
#include "engine/step_model.h"
#include "snapmla/engine.h"
#include "snapmla/error.h"

namespace snapmla {
namespace {

using oracle::Distance;
using oracle::kOracles;

class CudaEngine : public test::CudaTest {};

// F32 throughout: only the order of sums differs from transformers.
constexpr double kF32Bound = 1e-5;

class CudaOracle : public test::CudaTest, public testing::WithParamInterface<std::string> {};

TEST_P(CudaOracle, F32CacheMatchesTransformers) {
  const std::string& name = GetParam();
  const model::SafetensorsFile golden(kOracles / name / "golden.safetensors");
  EngineOptions options;
  options.model_dir = oracle::checkpoint_dir(name).string();
  options.kv_cache = KvCacheFormat::kF32;
  options.backend = "cuda";
  options.max_model_len = 256;
  Engine engine(options);
  const auto& t = golden.tensors();
  for (const std::string which : {"len1", "len17", "len130"}) {
    const std::vector<float> logits = engine.logits(oracle::ids_of(t.at(which + ".ids")));
    const TensorView want = t.at(which + ".logits");
    const std::int64_t start = t.at(which + ".logits_start").data<std::int32_t>()[0];
    Distance d;
    d.add(logits.data() + start * want.dim(1), want.data<float>(), want.numel());
    EXPECT_LT(d.relative(), kF32Bound) << which;
  }
  SamplingParams params;
  params.max_tokens = t.at("greedy.ids").numel();
  params.ignore_eos = true;
  EXPECT_EQ(engine.generate(oracle::ids_of(t.at("len17.ids")), params).tokens,
            oracle::ids_of(t.at("greedy.ids")));
}

INSTANTIATE_TEST_SUITE_P(Kinds, CudaOracle, testing::ValuesIn(oracle::kNames),
                         [](const auto& info) { return info.param; });

// Logits of prompts and of decode steps, device against cpu. The F32 cache shows the operations;
// BF16 and FP8 caches add elements that round to another value because a sum ended an ulp apart,
// and for FP8 the probabilities' codes.
struct Bound {
  KvCacheFormat format;
  double relative;
};

void compare_with_cpu(const std::filesystem::path& dir, const std::vector<std::int32_t>& tokens,
                      std::size_t prompt, const std::vector<Bound>& bounds) {
  for (const Bound& bound : bounds) {
    for (std::size_t seqlen_q : {1, 3}) {
      oracle::StepModel cpu(dir, bound.format, "cpu"), device(dir, bound.format, "cuda");
      const std::vector<float> want = cpu.logits(tokens, prompt, seqlen_q);
      const std::vector<float> got = device.logits(tokens, prompt, seqlen_q);
      ASSERT_EQ(got.size(), want.size());
      Distance d;
      d.add(got.data(), want.data(), static_cast<std::int64_t>(want.size()));
      EXPECT_LT(d.relative(), bound.relative)
          << dir << ", " << to_string(bound.format) << " cache, seqlen_q " << seqlen_q;
      testing::Test::RecordProperty(std::string("relative_l2_") + to_string(bound.format),
                                    std::to_string(d.relative()));
    }
  }
}

TEST_F(CudaEngine, StepsOfTheShippedModelAgreeWithCpu) {
  const std::vector<std::int32_t> prompt = shipped::Golden().prompt(0);
  compare_with_cpu(shipped::options(KvCacheFormat::kFp8).model_dir,
                   {prompt.begin(), prompt.begin() + 90}, 70,
                   {{KvCacheFormat::kF32, kF32Bound},
                    {KvCacheFormat::kBf16, 5e-3},
                    {KvCacheFormat::kFp8, 2e-2}});
}

// Experts: with F32 caches only, since another format may flip one and then all logits change.
TEST_F(CudaEngine, StepsOfExpertModelsAgreeWithCpu) {
  for (const std::string name : {"o1", "o2", "o4"}) {
    const model::SafetensorsFile golden(kOracles / name / "golden.safetensors");
    compare_with_cpu(oracle::checkpoint_dir(name),
                     oracle::ids_of(golden.tensors().at("len130.ids")), 110,
                     {{KvCacheFormat::kF32, kF32Bound}});
  }
}

TEST_F(CudaEngine, ShippedModelMatchesTheOracle) {
  EXPECT_LT(shipped::worst_distance(shipped::options(KvCacheFormat::kF32, "cuda"), 0.0f),
            kF32Bound);
  EXPECT_LT(shipped::worst_distance(shipped::options(KvCacheFormat::kBf16, "cuda"), 0.5f), 1e-2);
  EXPECT_LT(shipped::worst_distance(shipped::options(KvCacheFormat::kFp8, "cuda"), 2.0f), 5e-2);
}

TEST_F(CudaEngine, ChunksAndPrefixReuseChangeNoBit) {
  for (KvCacheFormat format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16, KvCacheFormat::kF32}) {
    shipped::expect_chunks_change_no_bit(shipped::options(format, "cuda"));
  }
}

TEST_F(CudaEngine, ForkedPagesAreCopiedOnTheDevice) {
  const std::unique_ptr<ops::OpSet> ops = engine::make_backend("cuda", 0);
  PagedCache cache(KvCacheFormat::kFp8, 2, 4, ops->memory());
  SequencePages a(cache);
  ASSERT_TRUE(a.extend(70));
  const std::uint8_t mark = 42;
  ops->memory().upload(cache.layer(1).latent_plane(a.table()[1]), &mark, 1);
  SequencePages b = a.fork();
  ASSERT_TRUE(b.extend(1));
  ASSERT_NE(a.table()[1], b.table()[1]);
  std::uint8_t seen = 0;
  ops->memory().download(&seen, cache.layer(1).latent_plane(b.table()[1]), 1);
  EXPECT_EQ(seen, mark);
}

TEST_F(CudaEngine, IsTheAutomaticChoiceAndCanBeForcedAway) {
  unsetenv("SNAPMLA_BACKEND");
  EXPECT_STREQ(engine::make_backend("auto", 1)->name(), "cuda");
  setenv("SNAPMLA_BACKEND", "cpu", 1);
  EXPECT_STREQ(engine::make_backend("auto", 1)->name(), "cpu");
  EXPECT_STREQ(engine::make_backend("cuda", 1)->name(), "cuda");
  unsetenv("SNAPMLA_BACKEND");
}

TEST_F(CudaEngine, RefusesTokensOutsideTheVocabularyAndKeepsWorking) {
  Engine engine(shipped::options(KvCacheFormat::kFp8, "cuda"));
  EXPECT_THROW(engine.logits({5, 2048}), Error);
  EXPECT_EQ(engine.logits({5, 7}).size(), 2u * 2048u);
}

}  // namespace
}  // namespace snapmla
