// snapmla run: text from a prompt.
#include <iostream>
#include <memory>

#include "commands.h"
#include "interrupt.h"

namespace snapmla::app {
namespace {

constexpr const char* kExamples =
    "Examples:\n"
    "  snapmla run -p \"import numpy as\" -n 40\n"
    "  snapmla run -m DeepSeek-V2-Lite -p \"Once\" --temp 0.7 --top-p 0.95 -s 1\n"
    "  snapmla run --compare < prompt.txt\n"
    "  snapmla run --chat --system \"Answer briefly.\"\n"
    "The text goes to standard output, everything else to standard error. Ctrl-C stops the text\n"
    "(exit status 130).";

int run_one(const RunFlags& flags) {
  const std::string prompt = read_prompt(flags);
  Engine engine(engine_options(flags.model));
  const std::vector<std::int32_t> ids = engine.encode(prompt);
  Interrupt::install();
  const RequestOutput out = engine.generate(ids, sampling_params(flags.sampling, engine, 128),
                                            [](const std::string& text) {
                                              std::cout << text << std::flush;
                                              return std::cout.good() && !Interrupt::requested();
                                            });
  std::cout << std::endl;
  print_summary(out, engine);
  return out.finish_reason == FinishReason::kCancelled ? kInterrupted : 0;
}

}  // namespace

void register_run(CLI::App& app, int& status) {
  auto flags = std::make_shared<RunFlags>();
  CLI::App* run = app.add_subcommand("run", "Write text from a prompt, or chat");
  CLI::Option* prompt =
      run->add_option("-p,--prompt", flags->prompt, "The prompt (default: standard input)");
  prompt->type_name("TEXT")->group("Prompt");
  run->add_option("-f,--file", flags->file, "Read the prompt from a file")
      ->type_name("FILE")
      ->excludes(prompt)
      ->group("Prompt");
  CLI::Option* chat = run->add_flag("--chat", flags->chat,
                                    "The prompt is a user's message; on a terminal without a\n"
                                    "prompt, a conversation");
  chat->group("Prompt");
  run->add_option("--system", flags->system, "System message of the chat")
      ->type_name("TEXT")
      ->needs(chat)
      ->group("Prompt");
  run->add_flag("--compare", flags->compare,
                "FP8 and BF16 caches side by side: text, logits, memory")
      ->excludes(chat)
      ->group("Prompt");
  add_sampling_flags(*run, flags->sampling);
  add_model_flags(*run, flags->model);
  run->get_option("--compare")->excludes(run->get_option("--kv-cache"));  // it has two of its own
  run->footer(kExamples);
  run->callback([flags, &status] {
    if (flags->compare) {
      status = run_compare(*flags, read_prompt(*flags));
    } else {
      status = flags->chat ? run_chat(*flags) : run_one(*flags);
    }
  });
}

}  // namespace snapmla::app
