// Two engines on one checkpoint, one with a BF16 and one with an FP8 cache.
#pragma once

#include <cstdint>
#include <vector>

#include "commands.h"

namespace snapmla::app {

struct Pair {
  explicit Pair(ModelFlags flags);
  Engine bf16, fp8;
};

// Prints where the generated tokens part, how far the logits agree, memory and speed. Returns the
// exit status.
int print_comparison(Pair& engines, const RequestOutput& a, const RequestOutput& b);

}  // namespace snapmla::app
