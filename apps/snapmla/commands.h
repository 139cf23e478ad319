// The subcommands. Each registers its flags on the app and is run by main when it was chosen.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "snapmla/snapmla.h"

namespace snapmla::app {

// Exit status after Ctrl-C, as shells have it: 128 + SIGINT.
inline constexpr int kInterrupted = 130;

// More than any machine has; keeps a slip of the finger from starting a million threads.
inline constexpr int kMaxThreads = 4096;

// Flags that several commands share.
struct ModelFlags {
  std::string model;  // empty: the shipped model
  std::string kv_cache = "fp8";
  std::string kv_rounding = "nearest";
  std::string device = "auto";
  std::int64_t max_model_len = 0;
  int threads = 0;
};

void add_model_flags(CLI::App& app, ModelFlags& flags);
EngineOptions engine_options(const ModelFlags& flags);
KvCacheFormat parse_format(const std::string& name);

// What the user said about sampling; what is empty comes from the checkpoint.
struct SamplingFlags {
  std::optional<float> temperature, top_p, min_p;
  std::optional<int> top_k;
  std::optional<std::uint64_t> seed;
  std::optional<std::int64_t> max_tokens;
  std::vector<std::string> stop;
  bool ignore_eos = false;
};

void add_sampling_flags(CLI::App& app, SamplingFlags& flags);
// The checkpoint's defaults with the flags over them.
SamplingParams sampling_params(const SamplingFlags& flags, const Engine& engine,
                               std::int64_t default_max_tokens);

struct RunFlags {
  ModelFlags model;
  SamplingFlags sampling;
  std::optional<std::string> prompt;
  std::string file;
  std::string system;
  bool chat = false, compare = false;
};

// All bytes of a file, which may be a pipe. Throws kNotFound or kIo, with the file's name.
std::string read_file(const std::string& path);

// -p, -f or standard input. Throws kInvalidArgument when there is none of them.
std::string read_prompt(const RunFlags& flags);

// Directory of the shipped model: SNAPMLA_MODEL_DIR, beside the installed program, or the source
// tree. Throws kNotFound.
std::string default_model();

// Validators for CLI11 that answer with what was got and what is accepted.
CLI::Validator one_of(const std::vector<std::string>& names);
CLI::Validator number_in(std::function<bool(double)> accepts, const std::string& accepted);
CLI::Validator integer_in(std::int64_t lowest, std::int64_t highest = 2147483647);

double rate(std::size_t tokens, double seconds);  // per second
void print_summary(const RequestOutput& out, const Engine& engine);

int run_chat(const RunFlags& flags);
int run_compare(const RunFlags& flags, const std::string& prompt);

void register_run(CLI::App& app, int& status);
void register_logits(CLI::App& app, int& status);
void register_inspect(CLI::App& app, int& status);
void register_bench(CLI::App& app, int& status);
void register_eval(CLI::App& app, int& status);

// What `snapmla` without a command does: the shipped model works through a ledger from a BF16 and
// from an FP8 cache, and every line is checked.
int run_demo();

}  // namespace snapmla::app
