#include "model/generation_config.h"

#include <algorithm>

#include "model/json.h"

namespace snapmla::model {

GenerationConfig load_generation_config(const std::filesystem::path& model_dir) {
  GenerationConfig config;
  const std::filesystem::path path = model_dir / "generation_config.json";
  if (!std::filesystem::exists(path)) return config;
  const nlohmann::json value = parse_json(read_text(path, 1 << 20), path.string());
  const JsonObject json(value, path.string());
  if (json.has("eos_token_id")) {
    const nlohmann::json& eos = json.raw("eos_token_id");
    for (const nlohmann::json& id : eos.is_array() ? eos : nlohmann::json::array({eos})) {
      if (!id.is_number_unsigned()) json.refuse("eos_token_id", "an id or a list of ids");
      config.eos_token_ids.push_back(id.get<std::int64_t>());
    }
  }
  if (json.has("temperature")) config.temperature = json.number("temperature", 0.0, 100.0);
  if (json.has("do_sample")) config.do_sample = json.boolean_or("do_sample", false);
  if (json.has("top_p")) {
    config.top_p = json.number("top_p", 0.0, 1.0);
    if (*config.top_p == 0) json.refuse("top_p", "a number with 0 < top_p <= 1");
  }
  if (json.has("min_p")) {
    config.min_p = json.number("min_p", 0.0, 1.0);
    if (*config.min_p == 1) json.refuse("min_p", "a number with 0 <= min_p < 1");
  }
  // Hugging Face writes -1 as well as 0 for "off".
  if (json.has("top_k")) {
    config.top_k = std::max<std::int64_t>(0, json.integer("top_k", -1, 2147483647));
  }
  return config;
}

}  // namespace snapmla::model
