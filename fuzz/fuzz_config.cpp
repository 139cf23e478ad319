// config.json of a stranger: a config or an Error, nothing else.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "model/config.h"
#include "model/rope_table.h"
#include "snapmla/error.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const snapmla::ModelConfig config =
        snapmla::model::parse_config({reinterpret_cast<const char*>(data), size}, "config.json");
    snapmla::model::build_rope_table(config, 2);
  } catch (const snapmla::Error&) {
  }
  return 0;
}
