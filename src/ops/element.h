// Reading and writing one element of a tensor whose type is known at run time.
#pragma once

#include "numeric/float_types.h"
#include "ops/op_set.h"

namespace snapmla::ops {

inline float load(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<const float*>(data)[i];
    case DType::kBF16:
      return numeric::bf16_to_float(static_cast<const BFloat16*>(data)[i]);
    case DType::kE4M3:
      return numeric::e4m3_to_float(static_cast<const Float8E4M3*>(data)[i]);
    default:
      return numeric::quiet_nan();
  }
}

inline void store(void* data, DType dtype, std::int64_t i, float value) {
  if (dtype == DType::kBF16) {
    static_cast<BFloat16*>(data)[i] = numeric::bf16_from_float(value);
  } else {
    static_cast<float*>(data)[i] = value;
  }
}

// Element (row, column) of a weight matrix, dequantised: e4m3 * scale_inv of its 128 x 128 block.
inline float weight_at(const Weight& w, std::int64_t row, std::int64_t column) {
  const float value = load(w.data.raw(), w.data.dtype(), row * w.data.stride(0) + column);
  if (w.data.dtype() != DType::kE4M3) return value;
  return value * w.scale_inv.row<float>(row / 128)[column / 128];
}

// Pointer to the element at `offset`, as bytes; null stays null.
inline void* element_ptr(const TensorView& t, std::int64_t offset) {
  if (t.raw() == nullptr) return nullptr;
  return static_cast<std::uint8_t*>(t.raw()) +
         offset * static_cast<std::int64_t>(size_of(t.dtype()));
}

}  // namespace snapmla::ops
