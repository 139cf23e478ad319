// config.json of a checkpoint directory, in both spellings that transformers has written.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include "snapmla/model_config.h"

namespace snapmla::model {

// Throws kNotFound, kInvalidFile (file, field, got, accepted) or kUnsupported (a well-formed config
// of a model that this project does not run, naming the field).
ModelConfig load_config(const std::filesystem::path& model_dir);
ModelConfig parse_config(std::string_view text, const std::string& file);

}  // namespace snapmla::model
