// A tiny random checkpoint of the DeepSeek family: config.json and model.safetensors in a
// directory.
#pragma once

#include <filesystem>
#include <string>

namespace snapmla::oracle {

// Everything about the model is a function of the seed: V2 or V3, q_lora or not, heads and widths,
// experts, groups and routing rule, RoPE spelling, YaRN, eps, tied embeddings, weight type.
// Weights are scaled so that logits are far from uniform. Returns what was chosen, for messages.
std::string write_random_checkpoint(unsigned seed, const std::filesystem::path& dir);

}  // namespace snapmla::oracle
