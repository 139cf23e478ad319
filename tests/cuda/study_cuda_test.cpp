// The study operations on the device against the host's, and a small evaluation on both.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "backends/cpu/cpu_backend.h"
#include "cuda/device_fixture.h"
#include "quality/evaluation.h"
#include "quality/study_problem.h"
#include "support/source_dir.h"

namespace snapmla {
namespace {

using numeric::StoreFault;
using numeric::StoreRule;
using numeric::StoreScale;
using ops::Accumulation;
using quality::StudyProblem;

class CudaStudySmall : public DeviceTest {};
class CudaEvaluation : public test::CudaTest {};

std::vector<StoreRule> fp8_rules() {
  std::vector<StoreRule> rules(1);
  StoreRule rule;
  rule.rope_e4m3 = true;
  rule.scale = StoreScale::kJoint;
  rules.push_back(rule);
  rule.scale = StoreScale::kStatic;
  rule.static_scale = 0.01f;
  rules.push_back(rule);
  for (const StoreFault fault :
       {StoreFault::kNeighbour, StoreFault::kBinade, StoreFault::kRopeUnscaled}) {
    for (const int every : {1, 32}) {
      StoreRule broken;
      broken.fault = fault;
      broken.fault_every = every;
      rules.push_back(broken);
    }
  }
  return rules;
}

std::vector<StoreRule> f32_rules() {
  std::vector<StoreRule> rules(4);
  rules[1].scale = StoreScale::kTile;
  rules[2].latent_e4m3 = rules[2].rope_bf16 = false;
  rules[3].noise = 0.1f;
  return rules;
}

TEST_F(CudaStudySmall, AppendWritesTheBytesOfTheHost) {
  const auto host = cpu::make_cpu_backend(2);
  for (const KvCacheFormat format : {KvCacheFormat::kFp8, KvCacheFormat::kF32}) {
    const auto rules = format == KvCacheFormat::kFp8 ? fp8_rules() : f32_rules();
    for (std::size_t i = 0; i < rules.size(); ++i) {
      StudyProblem want({}, 21, *host), got({}, 21, *ops_);
      const KvCacheView w = want.fill(format, &rules[i]), g = got.fill(format, &rules[i]);
      EXPECT_EQ(got.bytes(g), want.bytes(w)) << to_string(format) << ", rule " << i;
      if (format == KvCacheFormat::kF32) {
        const std::int64_t scales = want.num_pages * kPageSize;
        EXPECT_EQ(got.get<float>(g.scale, scales), want.get<float>(w.scale, scales)) << i;
      }
    }
  }
}

TEST_F(CudaStudySmall, DecodeAgreesWithTheHost) {
  const auto host = cpu::make_cpu_backend(2);
  const quality::StudyShape shape{{300, 64, 1}, 2, 5};
  for (const Accumulation accumulation :
       {Accumulation::kTwoLevel, Accumulation::kOneLevel, Accumulation::kTensorCore,
        Accumulation::kTensorCoreOneLevel}) {
    for (const int p_block : {64, 128}) {
      for (const bool quantise_p : {true, false}) {
        std::vector<std::vector<float>> out;
        for (ops::OpSet* ops : {host.get(), ops_.get()}) {
          StudyProblem p(shape, 23, *ops);
          const StoreRule rule;
          ops::StudyDecodeArgs a{p.decode_args(p.fill(KvCacheFormat::kF32, &rule)),
                                 {p_block, quantise_p, accumulation}};
          a.decode.num_splits = 1;
          ops->study_decode(a);
          out.push_back(p.out(a.decode));
        }
        EXPECT_LT(quality::relative(out[1], out[0]), quantise_p ? 2e-3 : 2e-4)
            << static_cast<int>(accumulation) << " " << p_block << " " << quantise_p;
      }
    }
  }
}

// Equal scales and no score: P is 448 throughout, and every cut is the host's (study_test.cpp).
TEST_F(CudaStudySmall, WherePIsConstantEveryCutIsTheHosts) {
  const auto host = cpu::make_cpu_backend(2);
  quality::StudyShape shape{{300, 64, 1}, 2, 5};
  shape.softmax_scale = 1e-30f;
  StoreRule rule;
  rule.scale = StoreScale::kStatic;
  rule.static_scale = 0.013f;
  for (const Accumulation accumulation :
       {Accumulation::kTensorCore, Accumulation::kTensorCoreOneLevel}) {
    std::vector<std::vector<float>> out;
    for (ops::OpSet* ops : {host.get(), ops_.get()}) {
      StudyProblem p(shape, 27, *ops);
      ops::StudyDecodeArgs a{p.decode_args(p.fill(KvCacheFormat::kF32, &rule)),
                             {128, true, accumulation}};
      a.decode.num_splits = 1;
      ops->study_decode(a);
      out.push_back(p.out(a.decode));
    }
    EXPECT_LT(quality::relative(out[1], out[0]), 1e-6) << static_cast<int>(accumulation);
  }
}

TEST_F(CudaStudySmall, TheSchemesSettingsGiveWhatTheKernelGives) {
  StudyProblem p({{300, 64, 1}, 2, 5}, 25, *ops_);
  const StoreRule rule;
  const MlaDecodeArgs real = p.decode_args(p.fill(KvCacheFormat::kFp8, nullptr));
  ops_->mla_decode(real);
  ops::StudyDecodeArgs study{p.decode_args(p.fill(KvCacheFormat::kF32, &rule)), {}};
  ops_->study_decode(study);
  EXPECT_LT(quality::relative(p.out(study.decode), p.out(real)), 2e-3);
}

quality::Journal::Json evaluate(const std::string& device, const std::filesystem::path& dir) {
  const std::filesystem::path model = source_dir() / "models/snapmla-20m";
  quality::Settings s;
  s.model_dir = model.string();
  s.device = device;
  s.arms = {"main", "f-binade", "f-neighbour", "sim"};
  s.text_file = (model / "eval/text.jsonl").string();
  s.item_files = {(model / "eval/items.jsonl").string()};
  s.items = 1;
  s.answer_step = 16;
  s.contexts = {192};
  s.text_tokens = 2 * 192;
  s.score = 48;
  s.batch_tokens = 4096;
  s.max_model_len = 2560;
  s.prompts_by_decode = device == "cuda";
  s.out_dir = (dir / device).string();
  std::filesystem::create_directories(s.out_dir);
  quality::Evaluation e(s);
  EXPECT_TRUE(e.run({}));
  return e.report();
}

TEST_F(CudaEvaluation, FiguresAreThoseOfTheHost) {
  const std::filesystem::path dir =
      std::filesystem::temp_directory_path() / ("snapmla-cuda-eval-" + std::to_string(getpid()));
  const auto host = evaluate("cpu", dir), device = evaluate("cuda", dir);
  std::filesystem::remove_all(dir);
  ASSERT_EQ(device["text"].size(), host["text"].size());
  for (std::size_t i = 0; i < host["text"].size(); ++i) {
    const auto &w = host["text"][i], &g = device["text"][i];
    const std::string arm = w["arm"].get<std::string>();
    const bool fault = arm.starts_with("f-");
    const double want = w["perplexity"]["value"], got = g["perplexity"]["value"];
    // 96 tokens: what the devices round differently is noise that a larger n would average out.
    EXPECT_NEAR(got, want, (fault ? 0.1 : 1e-2) * want) << arm;
    if (arm == "a1") continue;
    const auto& verdict = device["verdicts"][i - 1];
    if (fault) {
      EXPECT_TRUE(verdict["caught"].get<bool>()) << arm;
    }
    if (arm.starts_with("a2") || arm == "sim") {
      // The top token may be: 1 of 48 in both windows is beyond 99.5%.
      for (const auto& what : verdict["beyond"])
        EXPECT_TRUE(what.get<std::string>().starts_with("top1")) << arm << ": " << what;
      EXPECT_GE(g["top1"]["value"].get<double>(), 0.95) << arm;
    }
    const double kl = w["kl"]["value"], kl_device = g["kl"]["value"];
    if (arm == "a1-split") {
      EXPECT_LT(kl_device, 1e-4);
    } else {
      EXPECT_LT(std::max(kl, kl_device), 3 * std::min(kl, kl_device)) << arm;
    }
  }
  for (std::size_t i = 0; i < host["kinds"].size(); ++i) {
    const auto& g = device["kinds"][i];
    if (g["kind"] == "arith" || g["arm"].get<std::string>().starts_with("f-")) continue;
    EXPECT_EQ(g["right"], g["n"]) << g["kind"] << " " << g["arm"];
  }
}

}  // namespace
}  // namespace snapmla
