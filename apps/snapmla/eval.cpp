// snapmla eval: what the cache formats do to a model's answers.
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>

#include "bench.h"
#include "bench_cuda.h"
#include "commands.h"
#include "interrupt.h"
#include "progress.h"
#include "quality/evaluation.h"
#include "quality/report.h"

namespace snapmla::app {
namespace {

namespace fs = std::filesystem;

constexpr int kUnfinished = 3;  // --time-limit ended the run; the same command goes on

struct EvalFlags {
  quality::Settings settings;
  bool quick = false, full = false;
  std::string prompts;  // empty: by the preset
  std::string text, out = "snapmla-eval";
  std::vector<std::string> items;
  double time_limit = 0;
};

// What the user did not say, from the preset, the device and the checkpoint's directory.
void complete(EvalFlags& flags, const CLI::App& command) {
  quality::Settings& s = flags.settings;
  const auto unset = [&](const char* option) { return command.count(option) == 0; };
  if (s.model_dir.empty()) s.model_dir = default_model();
  // The shipped model brings a small held-out set of its own.
  const fs::path data = fs::path(s.model_dir) / "eval";
  s.text_file = flags.text;
  s.item_files = flags.items;
  std::error_code code;
  if (unset("--text") && fs::exists(data / "text.jsonl", code))
    s.text_file = (data / "text.jsonl").string();
  if (unset("--items") && fs::exists(data / "items.jsonl", code))
    s.item_files = {(data / "items.jsonl").string()};
  if (s.text_file.empty() && s.item_files.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "eval: got neither --text nor --items, and " + data.string() +
                    " does not exist; accepted is at least one of them");
  }
  if (flags.quick) {
    if (unset("--arms")) s.arms = {"main", "faults"};
    if (unset("--contexts")) s.contexts = {512, 2048};
    if (unset("--text-tokens")) s.text_tokens = 8192;
    if (unset("--score")) s.score = 128;
    if (unset("--attention")) s.attention = {4096, 65536};
    if (unset("--answer-step")) s.answer_step = 16;
  } else {
    if (unset("--contexts")) s.contexts = {2048, 8192, 16384};
    if (flags.full && unset("--batch-tokens")) s.batch_tokens = 524288;
  }
  s.prompts_by_decode = flags.prompts.empty() ? flags.full : flags.prompts == "decode";
  s.out_dir = flags.out;
  if (s.text_file.empty() || s.contexts == std::vector<std::int64_t>{0}) s.contexts.clear();
}

void write_file(const std::string& path, const std::string& text) {
  const std::string partial = path + ".partial";
  std::ofstream out(partial, std::ios::binary);
  out << text;
  out.close();
  std::error_code code;
  if (out) fs::rename(partial, path, code);
  if (!out || code) throw Error(ErrorCode::kIo, path + ": cannot be written");
}

int run_eval(EvalFlags& flags, const CLI::App& command) {
  complete(flags, command);
  quality::Settings& s = flags.settings;
  std::error_code code;
  fs::create_directories(s.out_dir, code);
  if (code) throw Error(ErrorCode::kIo, s.out_dir + ": " + code.message());
  Interrupt::install();
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  quality::Evaluation evaluation(s, load_progress());
  bool finished = false;
  {
    WorkBar bar;
    finished = evaluation.run([&](double done, double total, const std::string& what) {
      bar.update(done, total, what);
      return !Interrupt::requested() && (flags.time_limit <= 0 || seconds() < flags.time_limit);
    });
  }
  quality::Journal::Json report = bench::describe_run();
  report.update(evaluation.report());
  report["machine"] = bench::describe_machine(bench::thread_count(s.threads));
  if (report["settings"]["device"] == "cuda") report["gpu"] = bench::describe_gpu();
  report["seconds_of_last_run"] = seconds();
  write_file(s.out_dir + "/report.json", report.dump(1) + "\n");
  const std::string text = quality::markdown(report);
  write_file(s.out_dir + "/report.md", text);
  std::fputs(text.c_str(), stdout);
  std::fprintf(stderr, "%s/report.md, report.json: %s, %.0f s\n", s.out_dir.c_str(),
               finished ? "complete" : "not finished, the same command goes on", seconds());
  if (finished) return 0;
  return Interrupt::requested() ? kInterrupted : kUnfinished;
}

void add_data_options(CLI::App& c, EvalFlags& f) {
  c.add_option("--text", f.text,
               "Held-out text: UTF-8, or *.jsonl with a \"text\" per line\n"
               "(default: MODEL/eval/text.jsonl if it exists)")
      ->type_name("FILE")
      ->group("Data");
  c.add_option("--items", f.items,
               "Task items, JSON lines (docs/quality.md); may be given\nseveral times (default: "
               "MODEL/eval/items.jsonl)")
      ->type_name("FILE")
      ->allow_extra_args(false)
      ->group("Data");
  c.add_option("--contexts", f.settings.contexts,
               "Lengths of text windows, 0: none (default:\n2048,8192,16384; --quick: 512,2048)")
      ->type_name("N,...")
      ->delimiter(',')
      ->check(integer_in(0))
      ->group("Data");
  c.add_option("--text-tokens", f.settings.text_tokens,
               "Tokens of text per length (default: 0, all there are;\n--quick: 8192)")
      ->type_name("N")
      ->check(integer_in(0))
      ->group("Data");
  c.add_option("--score", f.settings.score,
               "Last tokens of a window that count\n(default: 0, all but the first; --quick: 128)")
      ->type_name("N")
      ->check(integer_in(0))
      ->group("Data");
  c.add_option("--attention", f.settings.attention,
               "Synthetic rows of so many tokens, for the error of the\nsums alone (default: none; "
               "--quick: 4096,65536)")
      ->type_name("N,...")
      ->delimiter(',')
      ->check(integer_in(1, 1 << 20))
      ->group("Data");
  c.add_option("--items-per-size", f.settings.items,
               "Items of each kind and size (default: 0, all there are)")
      ->type_name("N")
      ->check(integer_in(0))
      ->group("Data");
}

void add_run_options(CLI::App& c, EvalFlags& f) {
  c.add_option("--text-step", f.settings.text_step, "Tokens per decode step of text (default: 16)")
      ->type_name("N")
      ->check(integer_in(1, kMaxSeqlenQ))
      ->group("Run");
  c.add_option("--answer-step", f.settings.answer_step,
               "Tokens per decode step inside answers (default: 1, as\ngeneration has it; --quick: "
               "16, as drafts are verified)")
      ->type_name("N")
      ->check(integer_in(1, kMaxSeqlenQ))
      ->group("Run");
  c.add_option("--prompts", f.prompts,
               "How prompts fill the cache: prefill, or decode, which is\nfaster on a GPU "
               "(default: prefill; --full: decode)")
      ->type_name("WAY")
      ->check(one_of({"prefill", "decode"}))
      ->group("Run");
  c.add_option("--batch-tokens", f.settings.batch_tokens,
               "Tokens in each arm's cache at a time\n(default: 8192; --full: 524288)")
      ->type_name("N")
      ->check(integer_in(64))
      ->group("Run");
  c.add_option("--time-limit", f.time_limit,
               "Stop after so long; the same command goes on\n(default: 0, no limit)")
      ->type_name("SECONDS")
      ->check(number_in([](double x) { return x >= 0; }, "a number >= 0"))
      ->group("Run");
  c.add_option("-o,--output", f.out,
               "Directory of the report and of the state that a rerun\ngoes on from (default: "
               "snapmla-eval)")
      ->type_name("DIR")
      ->group("Run");
}

}  // namespace

void register_eval(CLI::App& app, int& status) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* c = app.add_subcommand("eval", "Measure what FP8 caches do to predictions and answers");
  quality::Settings& s = flags->settings;
  auto* quick = c->add_flag("--quick", flags->quick, "A small run of main arms and faults");
  c->add_flag("--full", flags->full, "Batches and prompts as suit a GPU")->excludes(quick);
  c->add_option("--arms", s.arms,
                "Arms or groups of them: main, ablations, faults, noise,\nall, noise:X (default: "
                "main; --quick: main,faults)")
      ->type_name("NAME,...")
      ->delimiter(',')
      ->allow_extra_args(false);
  c->add_option("-m,--model", s.model_dir, "Checkpoint directory (default: the shipped model)")
      ->type_name("DIR")
      ->group("Model");
  bench::add_device(*c, s.device)->group("Model");
  c->add_option("-c,--max-model-len", s.max_model_len,
                "Longest window or item (default: what config.json says)")
      ->type_name("TOKENS")
      ->check(integer_in(1))
      ->group("Model");
  bench::add_threads(*c, s.threads)->group("Model");
  add_data_options(*c, *flags);
  add_run_options(*c, *flags);
  std::string arms = "Arms:\n";
  for (const quality::Arm& arm : quality::all_arms()) {
    char line[120];
    std::snprintf(line, sizeof line, "  %-17s %s%s\n", arm.name.c_str(), arm.label.c_str(),
                  arm.simulated ? " (simulated)" : "");
    arms += line;
  }
  c->footer(arms +
            "Examples:\n"
            "  snapmla eval --quick\n"
            "  snapmla eval --full --device cuda --items items.jsonl --time-limit 450 -o DIR\n"
            "Exit status 3: the time limit ended the run; the same command goes on.");
  c->callback([flags, c, &status] { status = run_eval(*flags, *c); });
}

}  // namespace snapmla::app
