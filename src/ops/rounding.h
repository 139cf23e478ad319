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

// Rows [begin, end) of latent and rope at host addresses.
void round_latent_rows(const RoundLatentsArgs& args, float* latent, const float* rope,
                       std::int64_t begin, std::int64_t end);

void check_args(const RoundLatentsArgs& args);

}  // namespace snapmla::ops
