// The engine on tiny random checkpoints of every projection and routing kind, against transformers
// in fp32 (tests/oracles/README.md says what each one covers).
#include <gtest/gtest.h>

#include <cmath>

#include "engine/oracle_files.h"
#include "snapmla/snapmla.h"

namespace snapmla {
namespace {

using oracle::checkpoint_dir;
using oracle::kOracles;

class Oracle : public testing::TestWithParam<std::tuple<std::string, std::string>> {};

double distance(const std::vector<float>& got, const TensorView& want, std::int64_t start) {
  double difference = 0, norm = 0;
  const float* w = want.data<float>();
  const float* g = got.data() + start * want.dim(1);
  for (std::int64_t i = 0; i < want.numel(); ++i) {
    difference += (static_cast<double>(g[i]) - w[i]) * (static_cast<double>(g[i]) - w[i]);
    norm += static_cast<double>(w[i]) * w[i];
  }
  return std::sqrt(difference / norm);
}

TEST_P(Oracle, F32CacheMatchesTransformers) {
  const auto& [name, backend] = GetParam();
  const model::SafetensorsFile golden(kOracles / name / "golden.safetensors");
  EngineOptions options;
  options.model_dir = checkpoint_dir(name).string();
  options.kv_cache = KvCacheFormat::kF32;
  options.backend = backend;
  options.max_model_len = 256;
  Engine engine(options);
  const auto& t = golden.tensors();
  for (const std::string which : {"len1", "len17", "len130"}) {
    if (backend == "ref" && which == "len130") continue;
    const TensorView ids = t.at(which + ".ids");
    const std::vector<std::int32_t> tokens(ids.data<std::int32_t>(),
                                           ids.data<std::int32_t>() + ids.numel());
    const std::vector<float> logits = engine.logits(tokens);
    EXPECT_LT(distance(logits, t.at(which + ".logits"),
                       t.at(which + ".logits_start").data<std::int32_t>()[0]),
              1e-5)
        << which;
  }
  const TensorView ids = t.at("len17.ids"), greedy = t.at("greedy.ids");
  SamplingParams params;
  params.max_tokens = greedy.numel();
  params.ignore_eos = true;
  const RequestOutput out =
      engine.generate({ids.data<std::int32_t>(), ids.data<std::int32_t>() + ids.numel()}, params);
  EXPECT_EQ(out.tokens, std::vector<std::int32_t>(greedy.data<std::int32_t>(),
                                                  greedy.data<std::int32_t>() + greedy.numel()));
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, Oracle,
    testing::Combine(testing::Values("o1", "o2", "o3", "o4", "o6", "o7", "o7_half", "o7_eps"),
                     testing::Values("cpu", "ref")),
    [](const auto& info) { return std::get<0>(info.param) + "_" + std::get<1>(info.param); });

}  // namespace
}  // namespace snapmla
