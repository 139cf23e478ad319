// snapmla inspect: what a checkpoint is, and what its cache costs; with --cache what it holds.
#include <cmath>
#include <cstdio>
#include <memory>

#include "commands.h"
#include "inspect_cache.h"
#include "model/config.h"
#include "model/safetensors.h"

namespace snapmla::app {
namespace {

void row(const char* name, const std::string& value) {
  std::printf("%-22s %s\n", name, value.c_str());
}

std::string number(std::int64_t n) { return std::to_string(n); }

std::string gib(double bytes) {
  char text[40];
  std::snprintf(text, sizeof text, "%.3g GiB", bytes / 1073741824.0);
  return text;
}

void print_model(const ModelConfig& c) {
  row("architecture", c.architecture + " (" + c.model_type + ")");
  row("layers",
      number(c.num_hidden_layers) +
          (c.num_nextn_predict_layers ? " + " + number(c.num_nextn_predict_layers) + " MTP" : ""));
  row("hidden_size", number(c.hidden_size));
  row("heads", number(c.num_attention_heads) + " (nope " + number(c.qk_nope_head_dim) + ", rope " +
                   number(c.qk_rope_head_dim) + ", v " + number(c.v_head_dim) + ")");
  row("q_lora_rank", c.q_lora_rank ? number(*c.q_lora_rank) : "none");
  row("kv_lora_rank", number(c.kv_lora_rank));
  row("experts", c.num_experts ? number(c.num_experts) + ", top " + number(c.experts_per_token) +
                                     ", shared " + number(c.num_shared_experts)
                               : "none (dense)");
  row("vocabulary", number(c.vocab_size) + (c.tie_word_embeddings ? ", tied" : ""));
  row("context", number(c.max_position_embeddings) + (c.yarn ? " (YaRN)" : ""));
}

// Sizes and prices of the two formats; tokens in whole pages, cache memory only.
void print_cache(const ModelConfig& c, const std::vector<double>& memory_gib) {
  const auto page_bytes = [&](KvCacheFormat format) {
    return page_layout(format).page_bytes * c.num_hidden_layers;
  };
  const std::int64_t bf16 = page_bytes(KvCacheFormat::kBf16), fp8 = page_bytes(KvCacheFormat::kFp8);
  std::printf("\n%-22s %16s %16s\n", "cache, all layers", "BF16", "FP8");
  const auto line = [](const std::string& name, const std::string& a, const std::string& b) {
    std::printf("%-22s %16s %16s\n", name.c_str(), a.c_str(), b.c_str());
  };
  line("bytes per token", number(bf16 / kPageSize), number(fp8 / kPageSize));
  line("bytes per page of 64", number(bf16), number(fp8));
  const double context = std::ceil(static_cast<double>(c.max_position_embeddings) / kPageSize);
  line("one full context", gib(context * static_cast<double>(bf16)),
       gib(context * static_cast<double>(fp8)));
  for (const double memory : memory_gib) {
    const auto tokens = [&](std::int64_t page) {
      return number(static_cast<std::int64_t>(memory * 1073741824.0 / static_cast<double>(page)) *
                    kPageSize);
    };
    char name[40];
    std::snprintf(name, sizeof name, "tokens in %g GiB", memory);
    line(name, tokens(bf16), tokens(fp8));
  }
}

int inspect(const std::string& dir, const std::vector<double>& memory_gib) {
  const ModelConfig c = model::load_config(dir);
  const model::Checkpoint checkpoint = model::Checkpoint::open(dir);
  row("checkpoint", dir);
  print_model(c);
  row("weights", number(checkpoint.total_bytes()) + " bytes in " +
                     number(static_cast<std::int64_t>(checkpoint.tensors().size())) + " tensors" +
                     (c.fp8_weights ? ", FP8 128x128 blocks" : ""));
  print_cache(c, memory_gib);
  return 0;
}

}  // namespace

// The options of --cache, which are refused without it.
void add_cache_options(CLI::App& command, InspectCacheFlags& flags, CLI::Option* cache) {
  const auto add = [&](const char* name, auto& value, const char* type, const char* text) {
    CLI::Option* option = command.add_option(name, value, text);
    return option->type_name(type)->group("Cache analysis")->needs(cache);
  };
  CLI::Option* prompt = add("-p,--prompt", flags.prompt, "TEXT",
                            "Text to run through the model (default: a built-in\n"
                            "text of prose, code, a table and a ledger)");
  add("-f,--file", flags.file, "FILE", "Or the text of a file")->excludes(prompt);
  add("--tokens", flags.tokens, "N",
      "Only the first N tokens of the text (default: all, at\n"
      "most the model's context)")
      ->check(integer_in(1));
  add("-o,--output", flags.output, "FORM", "table, json or md (default: table)")
      ->check(one_of({"table", "json", "md"}));
  add("--svg", flags.svg, "FILE", "Draw the analysis as a picture too");
  add("--kv-cache", flags.rows, "FORMAT",
      "Rows before quantisation: f32, or rounded to bf16\n(default: f32)")
      ->check(one_of({"f32", "bf16"}));
  add("--device", flags.device, "NAME",
      "What runs the model: auto, cpu, cuda or ref\n(default: auto)")
      ->check(one_of({"auto", "cpu", "cuda", "ref"}));
  add("-t,--threads", flags.threads, "N", "CPU threads (default: all there are)")
      ->check(integer_in(1, kMaxThreads));
}

void register_inspect(CLI::App& app, int& status) {
  struct Flags {
    bool analyse = false;
    InspectCacheFlags cache;  // its model is the checkpoint in both cases
    std::vector<double> memory = {1, 8, 24, 80, 141};
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command =
      app.add_subcommand("inspect", "Print what a checkpoint is, what its cache costs and holds");
  command
      ->add_option("-m,--model,model", flags->cache.model,
                   "Checkpoint directory (default: the shipped model)")
      ->type_name("DIR");
  CLI::Option* cache =
      command->add_flag("--cache", flags->analyse,
                        "Analyse the cache of a text: ranges, outlier channels, error\n"
                        "of each granularity of FP8, which parts are safe to quantise");
  command
      ->add_option("--memory", flags->memory,
                   "Sizes of cache memory to fill, separated by commas\n(default: 1,8,24,80,141)")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->type_name("GIB")
      ->check(number_in([](double x) { return x > 0 && x <= 1e9; }, "a number of GiB > 0"))
      ->excludes(cache);
  add_cache_options(*command, flags->cache, cache);
  command->footer(
      "Examples:\n"
      "  snapmla inspect models/snapmla-20m --memory 0.5,16\n"
      "  snapmla inspect --cache --svg cache.svg\n"
      "  snapmla inspect --cache DIR -f text.txt --tokens 4096 -o json\n"
      "Without --cache only the headers of the weight files are read.");
  command->callback([flags, &status] {
    const std::string& model = flags->cache.model;
    status = flags->analyse ? inspect_cache(flags->cache)
                            : inspect(model.empty() ? default_model() : model, flags->memory);
  });
}

}  // namespace snapmla::app
