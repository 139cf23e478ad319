// cos and sin of every position, computed in double: at position 1e5 an f32 angle is already 8e-3
// rad off.
#pragma once

#include <cstdint>
#include <vector>

#include "snapmla/model_config.h"

namespace snapmla::model {

// inv_freq of each pair, with YaRN's blend of interpolation and extrapolation (arXiv 2309.00071).
std::vector<double> rope_frequencies(const ModelConfig& config);

// [positions, qk_rope_head_dim] f32: cos_0, sin_0, cos_1, sin_1, ..., times YaRN's cos/sin
// multiplier.
std::vector<float> build_rope_table(const ModelConfig& config, std::int64_t positions);

}  // namespace snapmla::model
