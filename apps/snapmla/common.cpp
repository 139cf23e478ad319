#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <memory>

#include "commands.h"
#include "progress.h"

namespace snapmla::app {

namespace fs = std::filesystem;

std::string default_model() {
  const char* forced = std::getenv("SNAPMLA_MODEL_DIR");
  if (forced && *forced) return forced;
  std::error_code code;
  const fs::path program = fs::read_symlink("/proc/self/exe", code);
  for (const fs::path& base : {program.parent_path().parent_path() / SNAPMLA_DATADIR / "snapmla",
                               fs::path(SNAPMLA_SOURCE_DIR "/models")}) {
    const fs::path dir = base / "snapmla-20m";
    if (fs::exists(dir / "config.json", code)) return dir.string();
  }
  throw Error(ErrorCode::kNotFound,
              "the shipped model was not found; give a checkpoint with --model DIR");
}

KvCacheFormat parse_format(const std::string& name) {
  if (name == "fp8") return KvCacheFormat::kFp8;
  if (name == "bf16") return KvCacheFormat::kBf16;
  return KvCacheFormat::kF32;
}

CLI::Validator one_of(const std::vector<std::string>& names) {
  return CLI::Validator(
      [names](std::string& got) {
        std::string accepted;
        for (const std::string& name : names) {
          if (got == name) return std::string();
          accepted += (accepted.empty() ? "" : ", ") + name;
        }
        return "got '" + got + "', accepted are " + accepted;
      },
      "");
}

CLI::Validator number_in(std::function<bool(double)> accepts, const std::string& accepted) {
  return CLI::Validator(
      [accepts = std::move(accepts), accepted](std::string& got) {
        char* end = nullptr;
        const double value = std::strtod(got.c_str(), &end);
        const bool ok = !got.empty() && *end == '\0' && std::isfinite(value) && accepts(value);
        return ok ? std::string() : "got '" + got + "', accepted is " + accepted;
      },
      "");
}

CLI::Validator integer_in(std::int64_t lowest, std::int64_t highest) {
  const auto low = static_cast<double>(lowest), high = static_cast<double>(highest);
  return number_in([=](double x) { return x == std::floor(x) && x >= low && x <= high; },
                   "an integer from " + std::to_string(lowest) + " to " + std::to_string(highest));
}

void add_model_flags(CLI::App& app, ModelFlags& flags) {
  app.add_option("-m,--model", flags.model,
                 "Checkpoint directory: config.json, *.safetensors,\n"
                 "tokenizer.json (default: the shipped model)")
      ->type_name("DIR")
      ->group("Model");
  app.add_option("--kv-cache,--kv-cache-dtype", flags.kv_cache,
                 "Latent cache: fp8, bf16 or f32 (default: fp8)")
      ->type_name("FORMAT")
      ->check(one_of({"fp8", "bf16", "f32"}))
      ->group("Model");
  app.add_option("--kv-rounding", flags.kv_rounding,
                 "How an fp8 cache rounds latents: nearest, or feedback,\n"
                 "closer to bf16 for the same bytes (default: nearest)")
      ->type_name("WAY")
      ->check(one_of({"nearest", "feedback"}))
      ->group("Model");
  app.add_option("--device", flags.device,
                 "auto, cpu, cuda, or ref, the slow specification\n(default: auto)")
      ->type_name("NAME")
      ->check(one_of({"auto", "cpu", "cuda", "ref"}))
      ->group("Model");
  app.add_option("-c,--max-model-len", flags.max_model_len,
                 "Longest sequence (default: what config.json says)")
      ->type_name("TOKENS")
      ->check(integer_in(1))
      ->group("Model");
  app.add_option("-t,--threads", flags.threads, "CPU threads (default: all there are)")
      ->type_name("N")
      ->check(integer_in(1, kMaxThreads))
      ->group("Model");
}

EngineOptions engine_options(const ModelFlags& flags) {
  EngineOptions options;
  options.model_dir = flags.model.empty() ? default_model() : flags.model;
  options.backend = flags.device;
  options.kv_cache = parse_format(flags.kv_cache);
  options.kv_rounding =
      flags.kv_rounding == "feedback" ? KvRounding::kFeedback : KvRounding::kNearest;
  options.max_model_len = flags.max_model_len;
  options.threads = flags.threads;
  options.on_load_progress = load_progress();
  return options;
}

void add_sampling_flags(CLI::App& app, SamplingFlags& flags) {
  const auto add = [&app](const char* name, auto& value, const char* type, const char* text) {
    return app.add_option(name, value, text)->type_name(type)->group("Sampling");
  };
  add("-n,--max-tokens", flags.max_tokens, "N", "Tokens to write (default: 128; with --chat 1024)")
      ->check(integer_in(1));
  add("--temp,--temperature", flags.temperature, "T",
      "0 is greedy (this and the next three default to the\n"
      "checkpoint's generation_config.json, then to greedy)")
      ->check(number_in([](double x) { return x >= 0 && x <= 3e38; },
                        "a finite number >= 0 (0 = greedy)"));
  add("--top-k", flags.top_k, "K", "Only the K likeliest tokens; 0 is off")->check(integer_in(0));
  add("--top-p", flags.top_p, "P", "Only the likeliest tokens that make up P, 0 < P <= 1")
      ->check(number_in([](double x) { return x > 0 && x <= 1; }, "a number with 0 < P <= 1"));
  add("--min-p", flags.min_p, "P", "Only tokens at least P times as likely as the best")
      ->check(number_in([](double x) { return x >= 0 && x < 1; }, "a number with 0 <= P < 1"));
  add("-s,--seed", flags.seed, "N", "The same seed gives the same text (default: 0)")
      ->check(integer_in(0, std::int64_t{1} << 53));
  add("-r,--stop", flags.stop, "TEXT", "End before this text; may be given several times")
      ->allow_extra_args(false)
      ->check(CLI::Validator(
          [](std::string& got) {
            return got.empty() ? "got '', accepted is a text of at least 1 byte" : std::string();
          },
          ""));
  app.add_flag("--ignore-eos", flags.ignore_eos, "Go on past the end token")->group("Sampling");
}

SamplingParams sampling_params(const SamplingFlags& flags, const Engine& engine,
                               std::int64_t default_max_tokens) {
  SamplingParams params = engine.default_sampling();
  params.temperature = flags.temperature.value_or(params.temperature);
  params.top_p = flags.top_p.value_or(params.top_p);
  params.min_p = flags.min_p.value_or(params.min_p);
  params.top_k = flags.top_k.value_or(params.top_k);
  params.seed = flags.seed.value_or(params.seed);
  params.max_tokens = flags.max_tokens.value_or(default_max_tokens);
  params.stop = flags.stop;
  params.ignore_eos = flags.ignore_eos;
  return params;
}

std::string read_file(const std::string& path) {
  const auto refuse = [&path](int code) {
    throw Error(code == ENOENT ? ErrorCode::kNotFound : ErrorCode::kIo,
                path + ": cannot be read: " + std::strerror(code));
  };
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                             &std::fclose);
  if (!file) refuse(errno);
  std::string text;
  char block[1 << 16];
  while (const std::size_t n = std::fread(block, 1, sizeof block, file.get())) {
    text.append(block, n);
  }
  if (std::ferror(file.get())) refuse(errno);
  return text;
}

std::string read_prompt(const RunFlags& flags) {
  if (flags.prompt) return *flags.prompt;
  if (!flags.file.empty()) return read_file(flags.file);
  if (isatty(STDIN_FILENO)) {
    throw Error(ErrorCode::kInvalidArgument,
                "prompt: got nothing, accepted are -p TEXT, -f FILE, text on standard input, or "
                "--chat");
  }
  return {std::istreambuf_iterator<char>(std::cin), {}};
}

double rate(std::size_t tokens, double seconds) {
  return seconds > 0 ? static_cast<double>(tokens) / seconds : 0;
}

void print_summary(const RequestOutput& out, const Engine& engine) {
  const auto reused = static_cast<std::size_t>(out.reused_tokens);
  const std::string again = reused ? " (" + std::to_string(reused) + " reused)" : "";
  std::fprintf(
      stderr,
      "[%s, %s cache%s] prompt %zu tokens%s, %.1f tok/s | generated %zu tokens, %.1f tok/s "
      "| cache %lld bytes (%lld per token)\n",
      engine.backend_name().c_str(), to_string(engine.options().kv_cache),
      engine.options().kv_rounding == KvRounding::kFeedback ? ", feedback rounding" : "",
      out.prompt_tokens.size(), again.c_str(),
      rate(out.prompt_tokens.size() - reused, out.prompt_seconds), out.tokens.size(),
      rate(out.tokens.size(), out.decode_seconds), static_cast<long long>(out.cache_bytes),
      static_cast<long long>(engine.cache_bytes_per_token()));
}

}  // namespace snapmla::app
