// The options that only a GPU bench of attention has. This header needs no CUDA: a build without it
// knows the options too, and can say what they need.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "cli_text.h"

namespace snapmla::gpu {

struct AttentionCliFlags {
  std::string preset;
  bool ragged = false, deterministic = false, no_extras = false;
  int p_block = 128, rounds = 1;
  double load_s = 0.5, sustained_s = 0.3, idle_s = 0.7;
  std::string json, csv;
};

// `group`: their heading in --help. The sweep's own lists (--heads, ...) come before, if at all: a
// preset excludes them.
inline void add_attention_options(CLI::App& command, AttentionCliFlags& flags,
                                  const std::string& group = "Options") {
  using bench_cli::with_default;
  const auto add = [&](const char* name, auto& value, const char* type, const std::string& help,
                       CLI::Validator check) {
    // Its description would stand behind the type's name.
    return command.add_option(name, value, help)
        ->type_name(type)
        ->group(group)
        ->check(check.description(""));
  };
  const auto flag = [&](const char* name, bool& value, const char* help) {
    return command.add_flag(name, value, help)->group(group);
  };
  CLI::Option* preset = add("--preset", flags.preset, "NAME",
                            "A list of shapes instead of a sweep: issue (all of the\n"
                            "performance table), big, ragged, small or quick",
                            CLI::IsMember({"issue", "big", "ragged", "small", "quick"}));
  flag("--ragged", flags.ragged,
       "A ragged batch beside the contexts, log-uniform from 1k\nto 128k tokens");
  for (const char* name : {"--heads", "--seqlen-q", "--batch", "--context", "--ragged"}) {
    if (CLI::Option* list = command.get_option_no_throw(name)) preset->excludes(list);
  }
  add("--p-block", flags.p_block, "N",
      with_default("Tokens per scale of P in an FP8 cache, 64 or 128\n", flags.p_block),
      CLI::IsMember({64, 128}));
  flag("--deterministic", flags.deterministic, "Split every request by its own length alone");
  flag("--no-extras", flags.no_extras, "Do not time quantize_q, append_kv and plan beside decode");
  add("--rounds", flags.rounds, "N",
      with_default("Burst and sustained of every cache, so often", flags.rounds),
      CLI::Range(1, 1000));
  add("--idle", flags.idle_s, "SECONDS", with_default("Idle before a burst", flags.idle_s),
      CLI::Range(0.0, 60.0));
  add("--load", flags.load_s, "SECONDS",
      with_default("Load before a sustained timing", flags.load_s), CLI::Range(0.0, 600.0));
  add("--sustained", flags.sustained_s, "SECONDS",
      with_default("Length of a sustained timing", flags.sustained_s), CLI::Range(0.001, 600.0));
  command.add_option("--json", flags.json, "Write the report to this file")
      ->type_name("FILE")
      ->group(group);
  command.add_option("--csv", flags.csv, "Write the table to this file")
      ->type_name("FILE")
      ->group(group);
}

}  // namespace snapmla::gpu
