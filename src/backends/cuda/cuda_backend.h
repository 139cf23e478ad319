// The device backend: every operation as a kernel on one stream, results in device memory.
#pragma once

#include <memory>

#include "ops/op_set.h"

namespace snapmla::cuda {

// Throws kUnsupported with the reason when the current device cannot run it.
std::unique_ptr<ops::OpSet> make_cuda_backend();

}  // namespace snapmla::cuda
