// The shipped model and its goldens, made with transformers (tests/oracles/o8).
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "model/safetensors.h"
#include "snapmla/engine.h"
#include "support/source_dir.h"

namespace snapmla::shipped {

inline EngineOptions options(KvCacheFormat format, const std::string& backend = "cpu") {
  EngineOptions o;
  o.model_dir = (source_dir() / "models/snapmla-20m").string();
  o.kv_cache = format;
  o.max_model_len = 4096;
  o.backend = backend;
  return o;
}

struct Golden {
  model::SafetensorsFile file{source_dir() / "tests/oracles/o8/golden.safetensors"};
  std::vector<std::int32_t> prompt(std::int64_t i) const {
    const auto* offsets = file.tensors().at("prompts.offsets").data<std::int32_t>();
    const auto* ids = file.tensors().at("prompts.ids").data<std::int32_t>();
    return {ids + offsets[i], ids + offsets[i + 1]};
  }
  const float* logits(std::int64_t i) const { return file.tensors().at("logits").row<float>(i); }
  const float* margin(std::int64_t i) const {
    return file.tensors().at("greedy.margin").row<float>(i);
  }
  const std::int32_t* greedy(std::int64_t i) const {
    return file.tensors().at("greedy.ids").row<std::int32_t>(i);
  }
};

// Relative L2 distance of the last position's logits, worst over the eight prompts; and greedy
// tokens must be the golden ones up to the first position whose margin is below `margin`.
inline double worst_distance(const EngineOptions& options, float margin) {
  const Golden golden;
  Engine engine(options);
  EXPECT_EQ(engine.backend_name(), options.backend);
  const std::int64_t vocab = engine.config().vocab_size;
  double worst = 0;
  for (std::int64_t i = 0; i < 8; ++i) {
    const std::vector<std::int32_t> prompt = golden.prompt(i);
    const std::vector<float> logits = engine.logits(prompt);
    double difference = 0, norm = 0;
    for (std::int64_t v = 0; v < vocab; ++v) {
      const double want = golden.logits(i)[v];
      const double got = logits[logits.size() - static_cast<std::size_t>(vocab - v)];
      difference += (got - want) * (got - want);
      norm += want * want;
    }
    worst = std::max(worst, std::sqrt(difference / norm));
    SamplingParams greedy;
    greedy.max_tokens = 64;
    greedy.ignore_eos = true;
    const RequestOutput out = engine.generate(prompt, greedy);
    for (std::size_t t = 0; t < 64; ++t) {
      if (golden.margin(i)[t] < margin) break;
      EXPECT_EQ(out.tokens.at(t), golden.greedy(i)[t]) << "prompt " << i << ", token " << t;
    }
  }
  return worst;
}

// Consistent prefill: neither the chunk size nor pages found in the prefix index change a bit.
inline void expect_chunks_change_no_bit(EngineOptions o) {
  const std::vector<std::int32_t> prompt = Golden().prompt(1);
  const std::vector<std::int32_t> part(
      prompt.begin(), prompt.begin() + std::min<std::ptrdiff_t>(333, std::ssize(prompt)));
  Engine whole(o);
  const std::vector<float> want = whole.logits(part);
  for (int chunk : {1, 7, 64, 65, 200}) {
    o.prefill_chunk = chunk;
    EXPECT_EQ(Engine(o).logits(part), want) << "chunk " << chunk;
  }
  SamplingParams params;
  params.max_tokens = 24;
  params.ignore_eos = true;
  const RequestOutput first = whole.generate(part, params), second = whole.generate(part, params);
  EXPECT_EQ(first.reused_tokens, 0);
  EXPECT_EQ(second.reused_tokens, (std::ssize(part) - 1) / 64 * 64);
  EXPECT_EQ(first.tokens, second.tokens);
}

}  // namespace snapmla::shipped
