// snapmla run: text from a prompt; --compare: FP8 and BF16 caches side by side.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <memory>

#include "commands.h"
#include "model/tokenizer.h"

namespace snapmla::app {
namespace {

constexpr const char* kDemoPrompt =
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n";

struct RunFlags {
  ModelFlags model;
  std::string prompt;
  SamplingParams sampling;
  bool compare = false;
};

std::string read_prompt(const RunFlags& flags) {
  if (!flags.prompt.empty()) return flags.prompt;
  if (isatty(STDIN_FILENO)) {
    throw Error(ErrorCode::kInvalidArgument,
                "prompt: got nothing, accepted is -p TEXT or text on standard input");
  }
  return {std::istreambuf_iterator<char>(std::cin), {}};
}

double rate(std::size_t tokens, double seconds) {
  return seconds > 0 ? static_cast<double>(tokens) / seconds : 0;
}

void print_summary(const RequestOutput& out, const Engine& engine) {
  std::fprintf(stderr,
               "[%s, %s cache] prompt %zu tokens, %.1f tok/s | generated %zu tokens, %.1f tok/s | "
               "cache %lld bytes (%lld per token)\n",
               engine.backend_name().c_str(), to_string(engine.options().kv_cache),
               out.prompt_tokens.size(), rate(out.prompt_tokens.size(), out.prompt_seconds),
               out.tokens.size(), rate(out.tokens.size(), out.decode_seconds),
               static_cast<long long>(out.cache_bytes),
               static_cast<long long>(engine.cache_bytes_per_token()));
}

int run_one(const RunFlags& flags) {
  const std::string prompt = read_prompt(flags);
  Engine engine(engine_options(flags.model));
  const std::vector<std::int32_t> ids = engine.tokenizer().encode(prompt);
  const RequestOutput out = engine.generate(ids, flags.sampling, [](const std::string& text) {
    std::cout << text << std::flush;
    return true;
  });
  std::cout << std::endl;
  print_summary(out, engine);
  return 0;
}

struct Agreement {
  double mean_abs = 0, max_abs = 0, cosine = 0, top1 = 0;
};

// Logits of every position of the same tokens, from two caches.
Agreement agreement(const std::vector<float>& a, const std::vector<float>& b, std::int64_t vocab) {
  Agreement result;
  double dot = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(a[i]) - b[i]);
    result.mean_abs += difference;
    result.max_abs = std::max(result.max_abs, difference);
    dot += static_cast<double>(a[i]) * b[i];
    aa += static_cast<double>(a[i]) * a[i];
    bb += static_cast<double>(b[i]) * b[i];
  }
  const auto rows = static_cast<std::int64_t>(a.size()) / vocab;
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto best = [&](const std::vector<float>& x) {
      return std::max_element(x.begin() + r * vocab, x.begin() + (r + 1) * vocab) - x.begin();
    };
    result.top1 += best(a) == best(b) ? 1 : 0;
  }
  result.mean_abs /= static_cast<double>(a.size());
  result.top1 /= static_cast<double>(rows);
  result.cosine = dot / std::sqrt(aa * bb);
  return result;
}

int run_compare(const RunFlags& flags, const std::string& prompt) {
  ModelFlags model = flags.model;
  model.kv_cache = "bf16";
  Engine bf16(engine_options(model));
  model.kv_cache = "fp8";
  Engine fp8(engine_options(model));
  const std::vector<std::int32_t> ids = bf16.tokenizer().encode(prompt);
  const RequestOutput a = bf16.generate(ids, flags.sampling);
  const RequestOutput b = fp8.generate(ids, flags.sampling);
  std::cout << "--- prompt\n"
            << prompt << "\n--- BF16 cache\n"
            << a.text << "\n--- FP8 cache\n"
            << b.text << "\n---\n";

  const auto [at_a, at_b] =
      std::mismatch(a.tokens.begin(), a.tokens.end(), b.tokens.begin(), b.tokens.end());
  if (at_a == a.tokens.end() && at_b == b.tokens.end()) {
    std::printf("tokens     identical, all %zu\n", a.tokens.size());
  } else {
    std::printf("tokens     part at generated token %td of %zu\n", at_a - a.tokens.begin() + 1,
                a.tokens.size());
  }
  std::vector<std::int32_t> all = ids;
  all.insert(all.end(), a.tokens.begin(), a.tokens.end());
  const Agreement g = agreement(bf16.logits(all), fp8.logits(all), bf16.config().vocab_size);
  std::printf(
      "logits     on the BF16 text, %zu positions: same top token %.2f%%, cosine %.6f, mean "
      "|difference| %.4f, largest %.4f\n",
      all.size(), 100 * g.top1, g.cosine, g.mean_abs, g.max_abs);
  std::printf("cache      BF16 %lld bytes, FP8 %lld bytes: %.3fx smaller\n",
              static_cast<long long>(a.cache_bytes), static_cast<long long>(b.cache_bytes),
              static_cast<double>(a.cache_bytes) / static_cast<double>(b.cache_bytes));
  std::printf("speed      BF16 %.1f tok/s, FP8 %.1f tok/s\n",
              rate(a.tokens.size(), a.decode_seconds), rate(b.tokens.size(), b.decode_seconds));
  return 0;
}

}  // namespace

void register_run(CLI::App& app, int& status) {
  auto flags = std::make_shared<RunFlags>();
  CLI::App* run = app.add_subcommand("run", "Write text from a prompt");
  add_model_flags(*run, flags->model, true);
  run->add_option("-p,--prompt", flags->prompt, "Prompt; without it, standard input is read");
  run->add_option("-n,--max-tokens", flags->sampling.max_tokens, "Tokens to write")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  run->add_option("--temp,--temperature", flags->sampling.temperature, "0 = greedy")
      ->capture_default_str();
  run->add_option("--top-k", flags->sampling.top_k, "0 = off")->capture_default_str();
  run->add_option("--top-p", flags->sampling.top_p)->capture_default_str();
  run->add_option("--min-p", flags->sampling.min_p)->capture_default_str();
  run->add_option("-s,--seed", flags->sampling.seed)->capture_default_str();
  run->add_option("--stop", flags->sampling.stop,
                  "Stop before this text (may be given several times)");
  run->add_flag("--ignore-eos", flags->sampling.ignore_eos, "Go on past the end token");
  run->add_flag("--compare", flags->compare, "FP8 and BF16 caches side by side");
  run->callback([flags, &status] {
    status = flags->compare ? run_compare(*flags, read_prompt(*flags)) : run_one(*flags);
  });
}

int run_demo() {
  RunFlags flags;
  flags.sampling.max_tokens = 64;
  return run_compare(flags, kDemoPrompt);
}

}  // namespace snapmla::app
