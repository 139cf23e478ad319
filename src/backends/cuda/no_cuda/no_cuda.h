// What every operation of a build without CUDA does.
#pragma once

#include <string>

#include "snapmla/error.h"

namespace snapmla::cuda {

[[noreturn]] inline void not_built(const char* operation) {
  throw Error(ErrorCode::kUnsupported,
              std::string("backend cuda: ") + operation +
                  ": this build has no CUDA kernels (configured without nvcc, or with "
                  "SNAPMLA_CUDA=OFF)");
}

}  // namespace snapmla::cuda
