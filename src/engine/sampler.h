// Next-token choice from one row of logits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "snapmla/engine.h"

namespace snapmla::engine {

// Index of the largest logit, ties to the lowest index; NaN never wins. All NaN: 0.
std::int32_t argmax(std::span<const float> logits);

// Draws tokens for one request. The stream of random numbers depends on the seed alone, so a
// request repeats whatever else runs beside it.
class Sampler {
 public:
  // Throws kInvalidArgument, naming the field, for a temperature that is negative or not finite,
  // top_p outside (0, 1], min_p outside [0, 1), negative top_k.
  explicit Sampler(const SamplingParams& params);

  // logits: [vocab_size]. NaN counts as -inf; when nothing is left, the argmax is taken.
  std::int32_t sample(std::span<const float> logits);

 private:
  struct Candidate {
    float probability;  // unnormalised
    std::int32_t token;
  };
  double uniform();

  SamplingParams params_;
  std::uint64_t state_;
  std::vector<Candidate> candidates_;
};

}  // namespace snapmla::engine
