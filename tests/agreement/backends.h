// The backends under test, made once.
#pragma once

#include "backends/cpu/cpu_backend.h"
#include "backends/ref/ref_backend.h"

namespace snapmla::agreement {

inline ops::OpSet& ref_backend() {
  static const std::unique_ptr<ops::OpSet> backend = ref::make_ref_backend();
  return *backend;
}
inline ops::OpSet& cpu_backend() {
  static const std::unique_ptr<ops::OpSet> backend = cpu::make_cpu_backend(1);
  return *backend;
}
// For the thread sanitizer and for what threads could change.
inline ops::OpSet& threaded_backend() {
  static const std::unique_ptr<ops::OpSet> backend = cpu::make_cpu_backend(3);
  return *backend;
}

}  // namespace snapmla::agreement
