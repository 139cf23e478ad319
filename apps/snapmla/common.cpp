#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>

#include "commands.h"

namespace snapmla::app {

std::string default_model() {
  const char* forced = std::getenv("SNAPMLA_MODEL_DIR");
  if (forced && *forced) return forced;
  for (const char* base : {SNAPMLA_SOURCE_DIR "/models", SNAPMLA_INSTALL_DATADIR "/snapmla"}) {
    const std::filesystem::path dir = std::filesystem::path(base) / "snapmla-20m";
    if (std::filesystem::exists(dir / "config.json")) return dir.string();
  }
  throw Error(ErrorCode::kNotFound,
              "the shipped model was not found; give a checkpoint with --model DIR");
}

KvCacheFormat parse_format(const std::string& name) {
  if (name == "fp8") return KvCacheFormat::kFp8;
  if (name == "bf16") return KvCacheFormat::kBf16;
  return KvCacheFormat::kF32;
}

void add_model_flags(CLI::App& app, ModelFlags& flags, bool with_cache) {
  app.add_option("-m,--model", flags.model,
                 "Checkpoint directory (config.json, safetensors, tokenizer.json); default: the "
                 "shipped model");
  if (with_cache) {
    app.add_option("--kv-cache", flags.kv_cache, "Format of the latent cache")
        ->check(CLI::IsMember({"fp8", "bf16", "f32"}))
        ->capture_default_str();
  }
  app.add_option("--device", flags.device, "auto, cpu, cuda, or ref (the slow specification)")
      ->check(CLI::IsMember({"auto", "cpu", "cuda", "ref"}))
      ->capture_default_str();
  app.add_option("--max-model-len", flags.max_model_len,
                 "Longest sequence in tokens; default: the checkpoint's")
      ->check(CLI::NonNegativeNumber);
  app.add_option("-t,--threads", flags.threads, "Threads; default: all that the process may use")
      ->check(CLI::NonNegativeNumber);
}

EngineOptions engine_options(const ModelFlags& flags) {
  EngineOptions options;
  options.model_dir = flags.model.empty() ? default_model() : flags.model;
  options.backend = flags.device;
  options.kv_cache = parse_format(flags.kv_cache);
  options.max_model_len = flags.max_model_len;
  options.threads = flags.threads;
  if (isatty(STDERR_FILENO)) {
    options.on_load_progress = [](std::int64_t done, std::int64_t total) {
      const double fraction = static_cast<double>(done) / static_cast<double>(total);
      std::cerr << "\rloading " << static_cast<int>(fraction * 100) << "%"
                << (fraction >= 1 ? "\r            \r" : "") << std::flush;
    };
  }
  return options;
}

}  // namespace snapmla::app
