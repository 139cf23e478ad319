// snapmla: the command line. Errors are one line on stderr; exit 1 for errors, 2 for wrong usage.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "commands.h"

namespace {

constexpr const char* kAbout =
    "snapmla: FP8 decoding for Multi-head Latent Attention (DeepSeek-V2/V3, Kimi-K2).\n"
    "Without a command the shipped model works through a short computation, from a BF16 and from\n"
    "an FP8 cache, side by side.";

constexpr const char* kExamples =
    "Examples:\n"
    "  snapmla run -p \"import numpy as\" -n 40\n"
    "  snapmla run --chat\n"
    "  snapmla run -p \"import numpy as\" --temp 1 --compare\n"
    "  snapmla inspect DIR\n"
    "Environment:\n"
    "  SNAPMLA_BACKEND    what --device auto stands for: cuda, cpu or ref (scalar, for checking);\n"
    "                     unset: cuda where a GPU can run it, else cpu\n"
    "  SNAPMLA_MODEL_DIR  directory of the model that is used without -m, instead of the shipped "
    "one\n"
    "'snapmla COMMAND --help' describes a command. Exit status: 0 success, 1 error, 2 wrong "
    "usage,\n"
    "130 stopped with Ctrl-C.";

// Option names and what they take, without CLI11's lists of what excludes what.
class Formatter : public CLI::Formatter {
 public:
  std::string make_option_opts(const CLI::Option* option) const override {
    if (option->get_type_size() == 0) return "";
    return " " + option->get_type_name() + (option->get_required() ? " (required)" : "");
  }
};

// One line for the mistake, one for where to read on.
int usage_error(const CLI::App& app, const CLI::ParseError& e) {
  std::string message = e.what();
  const auto chosen = app.get_subcommands();
  const std::vector<std::string> unknown = app.remaining(true);
  if (!unknown.empty()) {
    const auto flag = std::find_if(unknown.begin(), unknown.end(),
                                   [](const std::string& x) { return x.starts_with("-"); });
    message = "got '" + (flag != unknown.end() ? *flag : unknown.front()) + "', accepted are " +
              (chosen.empty() ? "the commands" : "the options") + " that --help lists";
  }
  std::string help_of;  // the innermost command that was chosen
  for (auto at = chosen; !at.empty(); at = at.front()->get_subcommands()) {
    help_of += at.front()->get_name() + " ";
  }
  std::cerr << "snapmla: error: " << message << "\nTry 'snapmla " << help_of << "--help'.\n";
  return 2;
}

int run(int argc, char** argv) {
  CLI::App app(kAbout, "snapmla");
  app.formatter(std::make_shared<Formatter>());
  app.footer(kExamples);
  app.get_formatter()->column_width(36);
  app.set_version_flag("--version", std::string("snapmla ") + SNAPMLA_VERSION,
                       "Print the version and exit");
  app.set_help_flag("-h,--help", "Print this help and exit");
  app.require_subcommand(0, 1);
  int status = 0;
  snapmla::app::register_run(app, status);
  snapmla::app::register_logits(app, status);
  snapmla::app::register_inspect(app, status);
  snapmla::app::register_bench(app, status);
  snapmla::app::register_eval(app, status);
  try {
    app.parse(argc, argv);
    if (app.get_subcommands().empty()) status = snapmla::app::run_demo();
    return status;
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
    return usage_error(app, e);
  } catch (const snapmla::Error& e) {
    std::cerr << "snapmla: error: " << e.what() << '\n';
  } catch (const std::bad_alloc&) {
    std::cerr << "snapmla: error: out of memory\n";
  } catch (const std::exception& e) {
    std::cerr << "snapmla: error: " << e.what() << '\n';
  }
  return 1;
}

// What was buffered may fail only here, on a full disk for example.
bool written() {
  std::cout.flush();
  return std::fflush(stdout) == 0 && std::ferror(stdout) == 0 && std::cout.good();
}

}  // namespace

int main(int argc, char** argv) {
  const int status = run(argc, argv);
  const bool reported = status != 0 && status != snapmla::app::kInterrupted;
  if (written() || reported) return status;
  std::cerr << "snapmla: error: standard output: cannot be written\n";
  return 1;
}
