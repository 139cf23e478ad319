// snapmla inspect --cache: what the latent cache of a text holds, and what each way of quantising
// it costs.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "analysis/layer_analysis.h"
#include "commands.h"

namespace snapmla::app {

struct InspectCacheFlags {
  std::string model;  // empty: the shipped model
  std::optional<std::string> prompt;
  std::string file;
  std::int64_t tokens = 0;  // 0: all, at most the model's context
  std::string output = "table";
  std::string svg;
  std::string rows = "f32", device = "auto";
  int threads = 0;
};

struct CacheReport {
  std::string model, backend, text, rows;
  std::string note;  // what the checkpoint says of itself when it is a stress copy; else empty
  std::int64_t tokens = 0, text_tokens = 0;  // used, and in the whole text
  std::int64_t sampled_positions = 0, sampled_heads = 0;
  analysis::SafetyRule rule;
  std::vector<analysis::LayerResult> layers;
  std::vector<double> feedback_left;  // [layers]
};

// A text of several kinds (prose, code, a table to recall from, a ledger), for a run without one.
extern const char* const kSampleText;

std::string cache_tables(const CacheReport& report, bool markdown);
std::string cache_json(const CacheReport& report);
std::string cache_svg(const CacheReport& report);

int inspect_cache(const InspectCacheFlags& flags);

}  // namespace snapmla::app
