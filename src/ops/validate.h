// Checks shared by the operations' fronts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
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

// Bytes from the first element to past the last, or nothing when they leave 63 bits. Strides of
// dimensions of one element count nothing.
inline std::optional<std::int64_t> byte_span(const TensorView& t) {
  std::int64_t last = 0, part = 0, bytes = 0;
  for (int d = 0; d < t.rank(); ++d) {
    if (t.dim(d) <= 0) return 0;
    if (t.dim(d) == 1) continue;
    if (__builtin_mul_overflow(t.dim(d) - 1, t.stride(d), &part) ||
        __builtin_add_overflow(last, part, &last)) {
      return std::nullopt;
    }
  }
  if (__builtin_add_overflow(last, 1, &last) ||
      __builtin_mul_overflow(last, static_cast<std::int64_t>(size_of(t.dtype())), &bytes)) {
    return std::nullopt;
  }
  return bytes;
}

// Shape (kAny = free), one of the types, contiguous last dimension, no negative stride, and, if
// there is any element, a pointer aligned to the element's size.
inline void check_tensor(const char* name, const TensorView& t,
                         std::initializer_list<std::int64_t> shape,
                         std::initializer_list<DType> types) {
  bool ok = t.rank() == static_cast<int>(shape.size());
  int d = 0;
  bool empty = t.rank() == 0;
  for (std::int64_t extent : shape) {
    ok = ok && (extent == kAny ? t.dim(d) >= 0 : t.dim(d) == extent);
    empty = empty || (ok && t.dim(d) == 0);
    ++d;
  }
  if (!ok || std::find(types.begin(), types.end(), t.dtype()) == types.end()) {
    std::string accepted = "[";
    for (std::int64_t extent : shape) {
      accepted += accepted.size() > 1 ? ", " : "";
      accepted += extent == kAny ? std::string("any") : std::to_string(extent);
    }
    accepted += "]";
    for (DType type : types)
      accepted += std::string(type == *types.begin() ? " " : " or ") + to_string(type);
    refuse(name, shape_of(t), accepted);
  }
  if (empty) return;
  if (t.raw() == nullptr) refuse(name, "a null pointer", "a valid pointer");
  if (reinterpret_cast<std::uintptr_t>(t.raw()) % size_of(t.dtype()) != 0) {
    refuse(name, "an address that is no multiple of its element size", "an aligned pointer");
  }
  if (t.dim(-1) > 1 && t.stride(-1) != 1) {
    refuse(name, str("last stride ", t.stride(-1)), "last stride 1");
  }
  for (d = 0; d < t.rank(); ++d) {
    if (t.dim(d) > 1 && t.stride(d) < 0) {
      refuse(name, str("stride ", t.stride(d), " in dimension ", d), "strides of at least 0");
    }
  }
  std::int64_t count = 1;
  for (d = 0; d < t.rank(); ++d) {
    if (__builtin_mul_overflow(count, t.dim(d), &count))
      refuse(name, shape_of(t), "less than 2^63 elements");
  }
  if (!byte_span(t)) refuse(name, shape_of(t) + " with such strides", "less than 2^63 bytes");
}

// No two elements of a tensor that is written may share memory: each stride reaches past everything
// that the smaller ones span.
inline void check_output(const char* name, const TensorView& t,
                         std::initializer_list<std::int64_t> shape,
                         std::initializer_list<DType> types) {
  check_tensor(name, t, shape, types);
  if (t.numel() == 0) return;
  for (int d = 0; d < t.rank(); ++d) {
    if (t.dim(d) == 1) continue;
    std::int64_t reach = 1;
    for (int e = 0; e < t.rank(); ++e) {
      const bool smaller = t.stride(e) < t.stride(d) || (t.stride(e) == t.stride(d) && e > d);
      if (t.dim(e) > 1 && smaller) reach += (t.dim(e) - 1) * t.stride(e);
    }
    if (t.stride(d) < reach) {
      refuse(name, str("stride ", t.stride(d), " in dimension ", d, ": elements share memory"),
             str("at least ", reach));
    }
  }
}

inline bool overlap(const void* a, std::int64_t a_bytes, const void* b, std::int64_t b_bytes) {
  const auto x = reinterpret_cast<std::uintptr_t>(a), y = reinterpret_cast<std::uintptr_t>(b);
  return a_bytes > 0 && b_bytes > 0 && x < y + static_cast<std::uintptr_t>(b_bytes) &&
         y < x + static_cast<std::uintptr_t>(a_bytes);
}

// Both checked before. The smallest ranges of memory that hold the two must be apart.
inline void check_no_overlap(const char* name, const TensorView& out, const char* other_name,
                             const TensorView& other) {
  if (overlap(out.raw(), *byte_span(out), other.raw(), *byte_span(other))) {
    refuse(name, std::string("memory that overlaps ") + other_name, "memory of its own");
  }
}

// As above, but the very same view is allowed.
inline void check_same_or_apart(const char* name, const TensorView& out, const char* other_name,
                                const TensorView& other) {
  bool same = out.raw() == other.raw();
  for (int d = 0; d < out.rank(); ++d) same = same && out.stride(d) == other.stride(d);
  if (!same) check_no_overlap(name, out, other_name, other);
}

}  // namespace snapmla::ops
