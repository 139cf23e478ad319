// The host backend: SIMD through Highway with run-time dispatch, and a pool of threads.
#pragma once

#include <memory>

#include "ops/op_set.h"

namespace snapmla::cpu {

// threads <= 0: all that the process may use.
std::unique_ptr<ops::OpSet> make_cpu_backend(int threads);

}  // namespace snapmla::cpu
