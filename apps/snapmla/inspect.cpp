// snapmla inspect: what a checkpoint is, and what its cache costs.
#include <cstdio>
#include <memory>

#include "commands.h"
#include "model/config.h"
#include "model/safetensors.h"

namespace snapmla::app {
namespace {

void row(const char* name, const std::string& value) {
  std::printf("%-22s %s\n", name, value.c_str());
}

int inspect(const std::string& dir, double memory_gib) {
  const ModelConfig c = model::load_config(dir);
  const model::Checkpoint checkpoint = model::Checkpoint::open(dir);
  const auto number = [](std::int64_t n) { return std::to_string(n); };
  row("checkpoint", dir);
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
  row("weights", number(checkpoint.total_bytes()) + " bytes in " +
                     number(static_cast<std::int64_t>(checkpoint.tensors().size())) + " tensors" +
                     (c.fp8_weights ? ", FP8 128x128 blocks" : ""));
  std::printf("\n%-8s %14s %14s %18s\n", "cache", "bytes/token", "bytes/page",
              ("tokens in " + std::to_string(static_cast<int>(memory_gib)) + " GiB").c_str());
  for (KvCacheFormat format : {KvCacheFormat::kBf16, KvCacheFormat::kFp8}) {
    const std::int64_t page = page_layout(format).page_bytes * c.num_hidden_layers;
    std::printf(
        "%-8s %14lld %14lld %18lld\n", to_string(format), static_cast<long long>(page / kPageSize),
        static_cast<long long>(page),
        static_cast<long long>(memory_gib * 1073741824.0 / static_cast<double>(page)) * kPageSize);
  }
  return 0;
}

}  // namespace

void register_inspect(CLI::App& app, int& status) {
  struct Flags {
    std::string model;
    double memory = 16;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command =
      app.add_subcommand("inspect", "Print what a checkpoint is and what its cache costs");
  command->add_option("-m,--model,model", flags->model,
                      "Checkpoint directory; default: the shipped model");
  command->add_option("--memory", flags->memory, "GiB of cache memory to fill")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->callback([flags, &status] {
    status = inspect(flags->model.empty() ? default_model() : flags->model, flags->memory);
  });
}

}  // namespace snapmla::app
