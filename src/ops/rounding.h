// How latents are rounded with feedback (snapmla/kv_rounding.h), on the host.
#pragma once

#include <cstdint>
#include <vector>

#include "snapmla/error.h"
#include "snapmla/kv_rounding.h"

namespace snapmla::ops {

inline constexpr int kFeedbackBlock = 64;  // elements that are decided at once

// Adds w w^T to the upper triangle of gram, [512, 512], for each of `count` rows w of 512.
void add_squares(std::vector<double>& gram, const float* rows, std::int64_t count);

// From sum over rows w of W of w w^T, [512, 512] (upper triangle), which is used up: to it one
// hundredth of its mean diagonal is added, places are in the order of its diagonal, the least
// first. Throws `code`, naming `what`, when the sums are not finite.
LatentFeedback make_latent_feedback(std::vector<double>& gram, const char* what,
                                    ErrorCode code = ErrorCode::kInvalidFile);

inline constexpr int kFeedbackRows = 4;  // rows that share a reading of the matrix

// targets[t][i] -= errors[t][j] * rows[j][i] for t < count, i < width, in the order of the 64 j,
// product and difference rounded each. errors: [count, 64]; rows, targets: 512 apart.
using SubtractErrors = void (*)(int count, const float* errors, const float* rows, int width,
                                float* targets);
void subtract_errors(int count, const float* errors, const float* rows, int width, float* targets);

// Rows [begin, end) in the host's memory.
void round_latent_rows(const RoundLatentsArgs& args, std::int64_t begin, std::int64_t end,
                       SubtractErrors subtract = subtract_errors);

void check_args(const RoundLatentsArgs& args);

}  // namespace snapmla::ops
