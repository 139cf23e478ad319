#include "inspect_cache.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "analysis/cache_probe.h"
#include "base/thread_pool.h"
#include "engine/backend_factory.h"
#include "model/config.h"
#include "model/tokenizer.h"
#include "progress.h"

namespace snapmla::app {
namespace {

std::string text_of(const InspectCacheFlags& flags, std::string& name) {
  if (flags.prompt) {
    name = "the text given";
    return *flags.prompt;
  }
  if (!flags.file.empty()) {
    name = flags.file;
    return read_file(flags.file);
  }
  name = "the built-in text";
  return kSampleText;
}

// tools/stress_copy.py leaves a note in config.json, which every report repeats.
std::string stress_note(const std::string& dir) {
  const auto config = nlohmann::json::parse(read_file(dir + "/config.json"), nullptr, false);
  if (!config.is_object() || !config.contains("stress_copy")) return "";
  const nlohmann::json& about = config["stress_copy"];
  if (about.is_object() && about.contains("note") && about["note"].is_string()) {
    return about["note"].get<std::string>();
  }
  return "A stress copy. Not natural data.";
}

// One line on a terminal's stderr that is drawn over, removed at the end.
class Status {
 public:
  ~Status() {
    if (drawn_) std::fputs("\r\033[K", stderr);
  }
  void show(const char* what, std::int64_t done, std::int64_t total) {
    if (!terminal_) return;
    std::fprintf(stderr, "\r%s %lld of %lld\033[K", what, static_cast<long long>(done),
                 static_cast<long long>(total));
    drawn_ = true;
  }

 private:
  const bool terminal_ = isatty(STDERR_FILENO) != 0;
  bool drawn_ = false;
};

std::vector<std::int32_t> tokens_of(const InspectCacheFlags& flags, const std::string& dir,
                                    CacheReport& report) {
  const std::int64_t context = model::load_config(dir).max_position_embeddings;
  if (flags.tokens > context) {
    throw Error(ErrorCode::kInvalidArgument,
                "--tokens: got " + std::to_string(flags.tokens) + ", accepted are at most the " +
                    std::to_string(context) + " of the model's context");
  }
  std::vector<std::int32_t> ids = Tokenizer::load(dir).encode(text_of(flags, report.text));
  if (ids.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                report.text + ": got no tokens, accepted is at least 1");
  }
  report.text_tokens = std::ssize(ids);
  const std::int64_t limit = flags.tokens > 0 ? flags.tokens : context;
  if (std::ssize(ids) > limit) ids.resize(static_cast<std::size_t>(limit));
  report.tokens = std::ssize(ids);
  return ids;
}

CacheReport analyse(const InspectCacheFlags& flags) {
  const std::string dir = flags.model.empty() ? default_model() : flags.model;
  CacheReport report;
  report.model = std::filesystem::weakly_canonical(dir).filename().string();
  report.rows = flags.rows;
  report.note = stress_note(dir);
  const std::vector<std::int32_t> ids = tokens_of(flags, dir, report);

  Status status;
  analysis::CacheProbeOptions options;
  options.model_dir = dir;
  options.backend = flags.device;
  options.rows = parse_format(flags.rows);
  options.threads = flags.threads;
  options.on_load_progress = load_progress();
  options.on_progress = [&](std::int64_t done, std::int64_t total) {
    status.show("running the model: token", done, total);
  };
  const analysis::CacheProbe probe(options, ids);
  report.backend = probe.backend_name();
  report.sampled_positions = probe.sampled_positions();
  report.sampled_heads = probe.sampled_heads();

  const std::unique_ptr<ops::OpSet> host = engine::make_backend("cpu", flags.threads);
  ThreadPool threads(flags.threads);
  const std::int64_t layers = probe.config().num_hidden_layers;
  for (std::int64_t i = 0; i < layers; ++i) {
    status.show("quantising: layer", i + 1, layers);
    report.layers.push_back(analysis::analyse_layer(probe.layer(i), *host, threads));
    report.feedback_left.push_back(probe.feedback_left(i));
  }
  return report;
}

// Tried before the work: a path that cannot be written is known at once.
std::ofstream open_for_writing(const std::string& path) {
  std::ofstream file(path, std::ios::binary);
  if (!file) throw Error(ErrorCode::kIo, path + ": cannot be written");
  return file;
}

}  // namespace

int inspect_cache(const InspectCacheFlags& flags) {
  std::ofstream svg;
  if (!flags.svg.empty()) svg = open_for_writing(flags.svg);
  const CacheReport report = analyse(flags);
  const std::string text =
      flags.output == "json" ? cache_json(report) : cache_tables(report, flags.output == "md");
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (svg.is_open()) {
    svg << cache_svg(report);
    svg.close();
    if (!svg) throw Error(ErrorCode::kIo, flags.svg + ": cannot be written");
  }
  return 0;
}

}  // namespace snapmla::app
