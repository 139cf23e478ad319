#include <CLI/CLI.hpp>

#include "snapmla/snapmla.h"

int main(int argc, char** argv) {
  CLI::App app("snapmla: FP8 decoding for Multi-head Latent Attention");
  app.set_version_flag("--version", std::string("snapmla ") + SNAPMLA_VERSION);
  CLI11_PARSE(app, argc, argv);
  return 0;
}
