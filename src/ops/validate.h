// Checks shared by the operations' fronts.
#pragma once

#include <initializer_list>
#include <string>

#include "base/check.h"
#include "snapmla/tensor.h"

namespace snapmla::ops {

inline constexpr std::int64_t kAny = -1;  // a dimension whose extent is free

inline std::string shape_of(const TensorView& t) {
  std::string s = "[";
  for (int d = 0; d < t.rank(); ++d) s += (d ? ", " : "") + std::to_string(t.dim(d));
  return s + "] " + to_string(t.dtype());
}

[[noreturn]] inline void refuse(const char* name, const std::string& got,
                                const std::string& accepted) {
  throw Error(ErrorCode::kInvalidArgument,
              std::string(name) + ": got " + got + ", accepted is " + accepted);
}

// Shape (kAny = free), one of the types, contiguous last dimension, a pointer if there is any
// element.
inline void check_tensor(const char* name, const TensorView& t,
                         std::initializer_list<std::int64_t> shape,
                         std::initializer_list<DType> types) {
  std::string accepted = "[";
  bool ok = t.rank() == static_cast<int>(shape.size());
  int d = 0;
  for (std::int64_t extent : shape) {
    accepted += (d ? ", " : "") + (extent == kAny ? std::string("any") : std::to_string(extent));
    ok = ok && (extent == kAny ? t.dim(d) >= 0 : t.dim(d) == extent);
    ++d;
  }
  accepted += "]";
  bool type_ok = false;
  for (DType type : types) {
    accepted += std::string(type_ok || type != *types.begin() ? " or " : " ") + to_string(type);
    type_ok = type_ok || t.dtype() == type;
  }
  if (!ok || !type_ok) refuse(name, shape_of(t), accepted);
  if (t.numel() > 0 && t.raw() == nullptr) refuse(name, "a null pointer", "a valid pointer");
  if (t.numel() > 0 && t.dim(-1) > 1 && t.stride(-1) != 1) {
    refuse(name, "last stride " + std::to_string(t.stride(-1)), "last stride 1");
  }
}

inline std::int64_t byte_span(const TensorView& t) {
  std::int64_t last = 0;
  for (int d = 0; d < t.rank(); ++d) last += (t.dim(d) - 1) * t.stride(d);
  return (last + 1) * static_cast<std::int64_t>(size_of(t.dtype()));
}

inline void check_no_overlap(const char* name, const TensorView& out, const char* other_name,
                             const TensorView& other) {
  if (out.numel() == 0 || other.numel() == 0) return;
  const auto* a = static_cast<const char*>(out.raw());
  const auto* b = static_cast<const char*>(other.raw());
  if (a < b + byte_span(other) && b < a + byte_span(out)) {
    refuse(name, std::string("memory that overlaps ") + other_name, "memory of its own");
  }
}

}  // namespace snapmla::ops
