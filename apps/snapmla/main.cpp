// snapmla: the command line. Errors are one line on stderr; exit 1 for errors, 2 for wrong usage.
#include <exception>
#include <iostream>

#include "commands.h"

int main(int argc, char** argv) {
  CLI::App app(
      "snapmla: FP8 decoding for Multi-head Latent Attention (DeepSeek-V2/V3, Kimi-K2).\n"
      "Without a command it writes a short text with the shipped model, from an FP8 and a BF16 "
      "cache.");
  app.set_version_flag("--version", std::string("snapmla ") + SNAPMLA_VERSION);
  app.require_subcommand(0, 1);
  int status = 0;
  snapmla::app::register_run(app, status);
  snapmla::app::register_logits(app, status);
  snapmla::app::register_inspect(app, status);
  try {
    app.parse(argc, argv);
    if (app.get_subcommands().empty()) status = snapmla::app::run_demo();
    return status;
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  } catch (const snapmla::Error& e) {
    std::cerr << "snapmla: error: " << e.what() << '\n';
  } catch (const std::bad_alloc&) {
    std::cerr << "snapmla: error: out of memory\n";
  } catch (const std::exception& e) {
    std::cerr << "snapmla: error: " << e.what() << '\n';
  }
  return 1;
}
