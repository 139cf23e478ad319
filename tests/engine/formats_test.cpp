// How far BF16 and FP8 caches move the logits, per oracle, held to 1.5 times what was measured.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "engine/oracle_files.h"
#include "engine/step_model.h"
#include "snapmla/snapmla.h"
#include "support/naive_model.h"

namespace snapmla {
namespace {

using oracle::Distance;
using oracle::kOracles;

// Measured distances from the fp32 goldens (prompts) and from the naive fp64 model (decode):
//   prompt    relative L2 of the goldens' logits, cases len17 and len130 (O8: all prompts below
//   1000
//             tokens)
//   decode    relative L2 of decoded logits: the 32 greedy tokens after len17 and the last 64
//   tokens
//             of len130, one by one (O8: 24 greedy tokens after each short prompt)
//   median    of the relative L2 of single decoded positions. Weights are random and a router's gap
//             may be as small as 1e-3, so an FP8 cache flips an expert here and there and that
//             position's logits change at once: the sums above are full of it, the median is not.
//   absolute  the largest |difference| of one decoded logit: a greedy token whose margin is above
//             twice its bound must not change
//   agreed    greedy tokens that the format chooses too, given the golden ones before; out of 32
//             (O8: 96). One less is accepted.
// Measured on the cpu backend by
//   SNAPMLA_MEASURE=1 build/tests/test_engine --gtest_filter='*Formats*'
// which prints this table's rows.
struct Measured {
  const char* name;
  KvCacheFormat format;
  ScaleMode scale_mode;
  int p_block;
  double prompt, decode, median, absolute;
  int agreed;
};
constexpr double kSlack = 1.5;
constexpr KvCacheFormat kBf16 = KvCacheFormat::kBf16, kFp8 = KvCacheFormat::kFp8;
constexpr ScaleMode kAmax = ScaleMode::kAmax, kPow2 = ScaleMode::kPow2;

constexpr Measured kTable[] = {
    {"o1", kBf16, kAmax, 64, 3.29e-03, 3.46e-03, 3.15e-03, 8.10e-02, 32},
    {"o1", kFp8, kAmax, 64, 1.21e-01, 1.75e-01, 3.36e-02, 9.20e+00, 29},
    {"o1", kFp8, kAmax, 128, 1.21e-01, 1.50e-01, 3.34e-02, 9.14e+00, 29},
    {"o1", kFp8, kPow2, 64, 1.84e-01, 1.53e-01, 3.41e-02, 8.25e+00, 30},
    {"o2", kBf16, kAmax, 64, 1.75e-03, 2.19e-03, 2.03e-03, 5.15e-02, 32},
    {"o2", kFp8, kAmax, 64, 2.18e-02, 2.28e-02, 2.02e-02, 4.75e-01, 31},
    {"o3", kBf16, kAmax, 64, 2.67e-03, 3.14e-03, 2.59e-03, 7.46e-02, 32},
    {"o3", kFp8, kAmax, 64, 3.32e-02, 1.14e-01, 3.36e-02, 8.61e+00, 30},
    {"o4", kBf16, kAmax, 64, 2.28e-03, 2.84e-03, 2.63e-03, 6.12e-02, 32},
    {"o4", kFp8, kAmax, 64, 1.11e-01, 8.66e-02, 3.17e-02, 7.68e+00, 30},
    {"o6", kBf16, kAmax, 64, 3.09e-03, 8.14e-02, 3.31e-03, 7.82e+00, 32},
    {"o6", kFp8, kAmax, 64, 1.80e-01, 2.02e-01, 3.66e-02, 9.67e+00, 31},
    {"o7", kBf16, kAmax, 64, 3.59e-03, 4.09e-03, 3.57e-03, 2.26e-02, 32},
    {"o7", kFp8, kAmax, 64, 2.36e-01, 2.12e-01, 5.42e-02, 2.82e+00, 31},
    {"o7_half", kBf16, kAmax, 64, 4.09e-03, 4.37e-03, 4.07e-03, 2.31e-02, 32},
    {"o7_half", kFp8, kAmax, 64, 5.45e-02, 1.49e-01, 4.59e-02, 2.07e+00, 30},
    {"o7_eps", kBf16, kAmax, 64, 3.29e-03, 4.07e-03, 3.48e-03, 1.81e-02, 32},
    {"o7_eps", kFp8, kAmax, 64, 2.36e-01, 2.13e-01, 5.22e-02, 2.84e+00, 32},
    {"o8", kBf16, kAmax, 64, 1.35e-03, 8.78e-04, 7.48e-04, 8.97e-02, 96},
    {"o8", kFp8, kAmax, 64, 8.42e-03, 7.41e-03, 6.98e-03, 2.38e-01, 96},
    {"o8", kFp8, kAmax, 128, 8.42e-03, 7.38e-03, 7.01e-03, 2.38e-01, 96},
    {"o8", kFp8, kPow2, 64, 9.82e-03, 7.70e-03, 6.66e-03, 2.97e-01, 96},
};

std::string label(const Measured& m) {
  return std::string(m.name) + (m.format == kBf16 ? "_bf16" : "_fp8") +
         (m.scale_mode == kPow2 ? "_pow2" : "") + (m.p_block == 128 ? "_p128" : "");
}

// One sequence to decode: tokens, of which the first `prompt` are prefilled; margins of the others.
struct Sequence {
  std::vector<std::int32_t> tokens;
  std::size_t prompt;
  const float* margins;
};

class Formats : public testing::TestWithParam<Measured> {
 protected:
  void add_prompt(oracle::StepModel& engine, const std::vector<std::int32_t>& ids,
                  const TensorView& want, std::int64_t row, std::int64_t rows, std::int64_t start) {
    const std::vector<float> logits = engine.logits(ids, ids.size());
    prompt_.add(logits.data() + start * want.dim(1), want.row<float>(row), rows * want.dim(1));
  }

  void add_decode(oracle::StepModel& engine, const oracle::NaiveModel& naive, const Sequence& s) {
    const oracle::Rows want = naive.forward(s.tokens).logits;
    const std::vector<float> got = engine.logits(s.tokens, s.prompt);
    const std::size_t vocab = want[0].size();
    for (std::size_t t = s.prompt; t < s.tokens.size(); ++t) {
      Distance row;
      for (Distance* d : {&row, &decode_})
        d->add(&got[t * vocab], want[t].data(), static_cast<std::int64_t>(vocab));
      rows_.push_back(row.relative());
    }
    if (s.margins == nullptr) return;
    // The logits before token t choose it.
    for (std::size_t t = s.prompt; t < s.tokens.size(); ++t) {
      const auto first = got.begin() + static_cast<std::ptrdiff_t>((t - 1) * vocab);
      const auto best = std::max_element(first, first + static_cast<std::ptrdiff_t>(vocab));
      const bool same = best - first == s.tokens[t];
      agreed_ += same;
      if (s.margins[t - s.prompt] > 2 * kSlack * GetParam().absolute) {
        EXPECT_TRUE(same) << "token " << t << ", margin " << s.margins[t - s.prompt];
      }
    }
  }

  double median() {
    std::sort(rows_.begin(), rows_.end());
    return rows_.at(rows_.size() / 2);
  }

  Distance prompt_, decode_;
  std::vector<double> rows_;
  int agreed_ = 0;
};

TEST_P(Formats, LogitsStayWithinTheMeasuredBounds) {
  const Measured& m = GetParam();
  const bool shipped = std::string(m.name) == "o8";
  const std::filesystem::path dir =
      shipped ? SNAPMLA_SOURCE_DIR "/models/snapmla-20m" : oracle::checkpoint_dir(m.name).string();
  const oracle::NaiveModel naive(dir / "config.json", dir);
  const model::SafetensorsFile golden(kOracles / m.name / "golden.safetensors");
  DecodeNumerics numerics;
  numerics.p_block = m.p_block;
  oracle::StepModel engine(dir, m.format, "cpu", numerics, m.scale_mode);
  const auto& t = golden.tensors();
  if (shipped) {
    const auto all = oracle::ids_of(t.at("prompts.ids")),
               offsets = oracle::ids_of(t.at("prompts.offsets"));
    for (std::int64_t i = 0; i < 8; ++i) {
      const auto at = static_cast<std::size_t>(i);
      std::vector<std::int32_t> ids(all.begin() + offsets[at], all.begin() + offsets[at + 1]);
      if (ids.size() > 1000) continue;
      const auto length = static_cast<std::int64_t>(ids.size());
      add_prompt(engine, ids, t.at("logits"), i, 1, length - 1);
      if (length > 80) continue;
      const std::int32_t* greedy = t.at("greedy.ids").row<std::int32_t>(i);
      ids.insert(ids.end(), greedy, greedy + 24);
      add_decode(engine, naive,
                 {ids, static_cast<std::size_t>(length), t.at("greedy.margin").row<float>(i)});
    }
  } else {
    for (const std::string which : {"len17", "len130"}) {
      const TensorView want = t.at(which + ".logits");
      add_prompt(engine, oracle::ids_of(t.at(which + ".ids")), want, 0, want.dim(0),
                 oracle::ids_of(t.at(which + ".logits_start"))[0]);
    }
    std::vector<std::int32_t> ids = oracle::ids_of(t.at("len17.ids"));
    const std::size_t prompt = ids.size();
    for (std::int32_t id : oracle::ids_of(t.at("greedy.ids"))) ids.push_back(id);
    add_decode(engine, naive, {ids, prompt, t.at("greedy.margin").data<float>()});
    add_decode(engine, naive, {oracle::ids_of(t.at("len130.ids")), 66, nullptr});
  }
  if (std::getenv("SNAPMLA_MEASURE")) {
    std::printf("MEASURED %s, %.2e, %.2e, %.2e, %.2e, %d\n", label(m).c_str(), prompt_.relative(),
                decode_.relative(), median(), decode_.largest, agreed_);
  }
  EXPECT_LE(prompt_.relative(), kSlack * m.prompt);
  EXPECT_LE(decode_.relative(), kSlack * m.decode);
  EXPECT_LE(median(), kSlack * m.median);
  EXPECT_LE(decode_.largest, kSlack * m.absolute);
  EXPECT_GE(agreed_, m.agreed - 1);
}

INSTANTIATE_TEST_SUITE_P(Oracles, Formats, testing::ValuesIn(kTable),
                         [](const auto& info) { return label(info.param); });

}  // namespace
}  // namespace snapmla
