#include "model/generation_config.h"

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
  if (json.has("top_p")) config.top_p = json.number("top_p", 0.0, 1.0);
  return config;
}

}  // namespace snapmla::model
