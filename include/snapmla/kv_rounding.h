// Rounding latents with the errors of others in mind, before append_kv stores them.
//
// Whoever reads a latent x does so through W = kv_b_proj: scores and values are linear in W x. To
// nearest, every element is rounded alone. Here an element's rounding error is fed back into the
// elements that are decided after it, so that W (x^ - x) becomes small instead of x^ - x: with
// H = W^T W = C^T C (Cholesky), |W e|^2 = |C e|^2, and row by row from the last element to the
// first each new term can be kept within half a step. This is what GPTQ (Frantar et al., arXiv
// 2210.17323) does to weights and Babai's algorithm to lattices; blocks of 64 elements are decided
// at once, which costs little of the gain and leaves products of matrices.
//
// The result is a row whose elements all are code * scale already, which append_kv stores without
// changing a value (kAmax: with the same scale and codes; kPow2 may halve the one and double the
// others), so pages and kernels are those of the format. Measured in
// docs/design/0005-feedback-rounding.md.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "snapmla/kv_cache.h"
#include "snapmla/tensor.h"

namespace snapmla {

// One layer's matrices where a backend can read them.
struct FeedbackView {
  TensorView order;   // [512] i32
  TensorView matrix;  // [512, 512] f32, both contiguous
};

// One layer's, in the host's memory. Place k of the order holds element order[k]; places are
// decided from the last block of 64 to the first.
struct LatentFeedback {
  std::array<std::int32_t, kKvLoraRank> order{};
  // [512, 512]: row j, column i: what an error of 1 at place j subtracts from the target of place
  // i, for i in an earlier block than j; not used elsewhere.
  std::vector<float> matrix;
  // Predicted |W e|^2 relative to nearest, from the weights alone, if every element's remaining
  // error were alike: 1 means that feedback gains nothing.
  double left = 1;

  FeedbackView view() const;  // valid while this stays where it is
};

// rows: [n, 512] f32, contiguous: the rows of a layer's kv_b_proj, dequantised, in any order.
// 131,328 n multiplications. Throws kInvalidArgument when `rows` is not whole rows or holds what is
// not finite.
LatentFeedback make_latent_feedback(std::span<const float> rows);

// Round latents of new tokens in place, after RMSNorm and RoPE and before append_kv. Bitwise the
// same on every backend. A row that append_kv would make NaN, or all zero, stays as it is. Rows may
// lie apart, but latent and rope must not be columns of one buffer.
struct RoundLatentsArgs {
  TensorView latent;  // [num_tokens, 512] f32, rounded in place
  TensorView rope;    // [num_tokens, 64] f32: has a part in the scale
  FeedbackView feedback;
  ScaleMode scale_mode = ScaleMode::kAmax;  // as append_kv will be given
};

}  // namespace snapmla
