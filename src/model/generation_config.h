// generation_config.json: the checkpoint author's defaults for sampling.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

namespace snapmla::model {

struct GenerationConfig {
  std::vector<std::int64_t> eos_token_ids;  // wins over config.json
  std::optional<bool> do_sample;
  std::optional<double> temperature, top_p, min_p;
  std::optional<std::int64_t> top_k;  // 0 = off
};

// A missing file gives an empty result. Throws kInvalidFile naming the field.
GenerationConfig load_generation_config(const std::filesystem::path& model_dir);

}  // namespace snapmla::model
