// The subcommands. Each registers its flags on the app and is run by main when it was chosen.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "snapmla/snapmla.h"

namespace snapmla::app {

// Flags that several commands share.
struct ModelFlags {
  std::string model;  // empty: the shipped model
  std::string kv_cache = "fp8";
  std::string device = "auto";
  std::int64_t max_model_len = 0;
  int threads = 0;
};

void add_model_flags(CLI::App& app, ModelFlags& flags, bool with_cache);
EngineOptions engine_options(const ModelFlags& flags);
KvCacheFormat parse_format(const std::string& name);

// Directory of the shipped model: SNAPMLA_MODEL_DIR, the source tree, or the installation. Throws
// kNotFound.
std::string default_model();

void register_run(CLI::App& app, int& status);
void register_logits(CLI::App& app, int& status);
void register_inspect(CLI::App& app, int& status);

// What `snapmla` without a command does: --compare on a short built-in prompt.
int run_demo();

}  // namespace snapmla::app
