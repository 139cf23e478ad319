// The study operations on the device (ops/study.h).
#pragma once

#include "backends/cuda/launch.h"
#include "ops/study.h"

namespace snapmla::cuda {

// FP8 or F32 cache; latent and rope f32.
void study_append(const ops::StudyAppendArgs& args, Stream stream);

// Plain and slow: one block per row, and no splits whatever num_splits says, since a split changes
// nothing that a study looks at but the last bits.
void study_decode(const ops::StudyDecodeArgs& args, Stream stream);

}  // namespace snapmla::cuda
