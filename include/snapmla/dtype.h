// Element types of tensors, and the storage types of the two that C++20 lacks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace snapmla {

enum class DType : std::uint8_t { kF32, kBF16, kE4M3, kF16, kF64, kI32, kI64, kU8, kBool };

// Bytes of one element.
constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kE4M3:
    case DType::kU8:
    case DType::kBool:
      return 1;
  }
  return 0;
}

// Lower-case name: "f32", "bf16", "e4m3", ...
const char* to_string(DType dtype) noexcept;

// bfloat16: the upper half of an IEEE binary32. Conversions are in numeric/.
struct BFloat16 {
  std::uint16_t bits = 0;
};

// FP8 e4m3 ("fn": no infinities; 0x7f and 0xff are NaN; largest finite 448). Conversions are in
// numeric/.
struct Float8E4M3 {
  std::uint8_t bits = 0;
};

static_assert(sizeof(BFloat16) == 2 && sizeof(Float8E4M3) == 1);

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kF64;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::kBF16;
};
template <>
struct DTypeOf<Float8E4M3> {
  static constexpr DType value = DType::kE4M3;
};
template <>
struct DTypeOf<std::int32_t> {
  static constexpr DType value = DType::kI32;
};
template <>
struct DTypeOf<std::int64_t> {
  static constexpr DType value = DType::kI64;
};
template <>
struct DTypeOf<std::uint8_t> {
  static constexpr DType value = DType::kU8;
};

}  // namespace snapmla
