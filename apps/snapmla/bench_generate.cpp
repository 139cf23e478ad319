// snapmla bench generate: prompt and generation tokens/s of a checkpoint, in llama-bench's form:
// test pp512 is a prompt of 512 random tokens, tg128 the generation of 128 tokens one by one, and
// tg128 @ d4096 the same behind a prompt of 4096.
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <iostream>
#include <memory>
#include <numeric>
#include <random>

#include "base/check.h"
#include "bench.h"
#include "commands.h"
#include "model/safetensors.h"

namespace snapmla::app::bench {
namespace {

struct Flags {
  std::string model, device = "auto", output = "table";
  std::vector<std::string> kv_cache = {"fp8"};
  std::vector<int> prompt = {512}, generate = {128}, depth = {0};
  int repetitions = 5, threads = 0;
  std::string kv_rounding = "nearest";
};

// Tokens of a prompt that no other prompt of the run begins with: a repeated one would be found in
// the prefix index and cost nothing.
std::vector<std::int32_t> random_prompt(const ModelConfig& config, std::int64_t tokens,
                                        std::mt19937& rng) {
  std::uniform_int_distribution<std::int32_t> pick(
      0, static_cast<std::int32_t>(config.vocab_size - 1));
  std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens));
  for (std::int32_t& id : ids) id = pick(rng);
  return ids;
}

class Bench {
 public:
  Bench(const Flags& f, const std::string& kv_cache, std::int64_t longest) : f_(f) {
    EngineOptions options;
    options.model_dir = f.model;
    options.backend = f.device;
    options.kv_cache = parse_format(kv_cache);
    if (f.kv_rounding == "feedback" && options.kv_cache == KvCacheFormat::kFp8)
      options.kv_rounding = KvRounding::kFeedback;
    options.threads = f.threads;
    options.max_model_len = 0;
    engine_ = std::make_unique<Engine>(options);
    if (longest > engine_->config().max_position_embeddings) {
      throw Error(ErrorCode::kInvalidArgument,
                  str("bench: got ", longest, " tokens in one sequence, accepted are at most ",
                      engine_->config().max_position_embeddings, " with this checkpoint"));
    }
  }

  // Tokens per second of prompts of `tokens` tokens.
  nlohmann::ordered_json prompt(int tokens) {
    return row("pp" + std::to_string(tokens), tokens, 0, [&] {
      const RequestOutput out = generate(tokens, 1);
      return tokens / out.prompt_seconds;
    });
  }

  // Tokens per second of `tokens` decode steps behind a prompt of `depth` tokens (at least one).
  // The first token comes from the prompt, so one more is asked for.
  nlohmann::ordered_json generation(int tokens, int depth) {
    const std::string at = depth > 0 ? " @ d" + std::to_string(depth) : "";
    return row("tg" + std::to_string(tokens) + at, tokens, depth, [&] {
      const RequestOutput out = generate(std::max(depth, 1), tokens + 1);
      if (static_cast<int>(out.tokens.size()) != tokens + 1) {
        throw Error(ErrorCode::kInternal,
                    str("bench: generated ", out.tokens.size(), " tokens instead of ", tokens + 1));
      }
      return tokens / out.decode_seconds;
    });
  }

 private:
  RequestOutput generate(int prompt, int tokens) {
    SamplingParams params;
    params.max_tokens = tokens;
    params.ignore_eos = true;
    const RequestOutput out =
        engine_->generate(random_prompt(engine_->config(), prompt, rng_), params);
    if (out.reused_tokens != 0) {
      throw Error(ErrorCode::kInternal, "bench: a random prompt was found in the prefix index");
    }
    return out;
  }

  template <class Fn>
  nlohmann::ordered_json row(const std::string& test, int tokens, int depth, const Fn& once) {
    once();  // warm-up
    std::vector<double> samples;
    for (int i = 0; i < f_.repetitions; ++i) samples.push_back(once());
    const double mean =
        std::accumulate(samples.begin(), samples.end(), 0.0) / static_cast<double>(samples.size());
    double squares = 0;
    for (double s : samples) squares += (s - mean) * (s - mean);
    const Spread s = spread(samples);
    return {
        {"model", std::filesystem::path(f_.model).lexically_normal().filename().string()},
        {"device", engine_->backend_name()},
        {"threads", thread_count(f_.threads)},
        {"kv_cache", to_string(engine_->options().kv_cache)},
        {"kv_rounding",
         engine_->options().kv_rounding == KvRounding::kFeedback ? "feedback" : "nearest"},
        {"test", test},
        {"tokens", tokens},
        {"depth", depth},
        {"t/s", mean},
        {"stddev",
         samples.size() > 1 ? std::sqrt(squares / static_cast<double>(samples.size() - 1)) : 0.0},
        {"median", s.median},
        {"p20", s.p20},
        {"p80", s.p80},
        {"samples", samples}};
  }

  const Flags& f_;
  std::unique_ptr<Engine> engine_;
  std::mt19937 rng_{1};
};

int run(Flags f) {
  if (f.model.empty()) f.model = default_model();
  while (f.model.size() > 1 && f.model.back() == '/') f.model.pop_back();
  std::int64_t longest = 1;
  for (int p : f.prompt) longest = std::max<std::int64_t>(longest, p);
  for (int n : f.generate)
    for (int d : f.depth) {
      if (n > 0) longest = std::max<std::int64_t>(longest, std::max(d, 1) + n);
    }
  Report report;
  report.about = describe_run();
  report.about["machine"] = describe_machine(thread_count(f.threads));
  const model::Checkpoint checkpoint = model::Checkpoint::open(f.model);
  report.about["model"] = {{"name", std::filesystem::path(f.model).filename().string()},
                           {"weight_bytes", checkpoint.total_bytes()}};
  report.columns = {{"model", ""},   {"device", ""},  {"threads", ""},    {"kv_cache", ""},
                    {"test", ""},    {"t/s", "%.2f"}, {"stddev", "%.2f"}, {"median", "%.2f"},
                    {"p20", "%.2f"}, {"p80", "%.2f"}};
  for (const std::string& kv : f.kv_cache) {
    Bench bench(f, kv, longest);
    for (int p : f.prompt) {
      if (p > 0) report.rows.push_back(bench.prompt(p));
    }
    for (int n : f.generate)
      for (int d : f.depth) {
        if (n > 0) report.rows.push_back(bench.generation(n, d));
      }
  }
  if (report.rows.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "bench: got -p 0 and -n 0, accepted is at least one of them above 0");
  }
  std::cout << to_text(report, parse_output(f.output));
  return 0;
}

}  // namespace

void register_generate(CLI::App& bench, int& status) {
  auto f = std::make_shared<Flags>();
  CLI::App* command = bench.add_subcommand(
      "generate",
      "Prompt and generation tokens/s of a checkpoint.\nLists make a sweep: -p 128,512");
  using bench_cli::with_default;
  command->add_option("-m,--model", f->model, "Checkpoint directory (default: the shipped model)")
      ->type_name("DIR");
  const auto list = [&](const char* name, auto& values, const char* help) {
    command->add_option(name, values, with_default(help, values))
        ->type_name("N,...")
        ->delimiter(',')
        ->check(integer_in(0, 1 << 24));
  };
  list("-p,--n-prompt", f->prompt, "Prompt tokens; 0 = no such test");
  list("-n,--n-gen", f->generate, "Generated tokens; 0 = no such test");
  list("-d,--n-depth", f->depth, "Prompt tokens before the generated ones");
  command
      ->add_option("-r,--repetitions", f->repetitions,
                   with_default("Runs of every test", f->repetitions))
      ->type_name("N")
      ->check(integer_in(1, 100000));
  add_kv_cache(*command, f->kv_cache);
  command
      ->add_option("--kv-rounding", f->kv_rounding,
                   with_default("Rounding of fp8: nearest or feedback", f->kv_rounding))
      ->type_name("WAY")
      ->check(one_of({"nearest", "feedback"}));
  add_device(*command, f->device);
  add_threads(*command, f->threads);
  add_output(*command, f->output);
  command->footer(
      "Examples:\n"
      "  snapmla bench generate -p 512 -n 128\n"
      "  snapmla bench generate -m DIR -p 0 -n 64 -d 0,2048 --kv-cache fp8,bf16 -o md\n"
      "Test pp512 is a prompt of 512 tokens, tg128 the generation of 128 tokens, and tg128 @ "
      "d2048\n"
      "the same behind a prompt of 2048.");
  command->callback([f, &status] { status = run(*f); });
}

}  // namespace snapmla::app::bench
