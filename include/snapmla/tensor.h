// A view of memory that somebody else owns: pointer, type, shape and strides. Views are cheap to
// copy.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "snapmla/dtype.h"

namespace snapmla {

// Up to five dimensions, row-major by default. Strides are in ELEMENTS and 64-bit; the last
// dimension of every operand of an operation must be contiguous (stride 1), the others may be
// padded.
class TensorView {
 public:
  static constexpr int kMaxRank = 5;

  TensorView() = default;

  // Contiguous view of `data` with `shape`.
  TensorView(const void* data, DType dtype, std::initializer_list<std::int64_t> shape)
      : data_(const_cast<void*>(data)), dtype_(dtype), rank_(static_cast<int>(shape.size())) {
    int i = 0;
    for (std::int64_t extent : shape) shape_[static_cast<std::size_t>(i++)] = extent;
    std::int64_t stride = 1;
    for (int d = rank_ - 1; d >= 0; --d) {
      stride_[static_cast<std::size_t>(d)] = stride;
      stride = product(stride, shape_[static_cast<std::size_t>(d)]);
    }
  }

  template <class T>
  static TensorView of(const T* data, std::initializer_list<std::int64_t> shape) {
    return TensorView(data, DTypeOf<std::remove_const_t<T>>::value, shape);
  }

  bool empty() const { return data_ == nullptr; }
  DType dtype() const { return dtype_; }
  int rank() const { return rank_; }
  std::int64_t dim(int d) const { return shape_[static_cast<std::size_t>(d < 0 ? rank_ + d : d)]; }
  std::int64_t stride(int d) const {
    return stride_[static_cast<std::size_t>(d < 0 ? rank_ + d : d)];
  }
  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int d = 0; d < rank_; ++d) n = product(n, shape_[static_cast<std::size_t>(d)]);
    return rank_ == 0 ? 0 : n;
  }
  bool contiguous() const {
    std::int64_t expect = 1;
    for (int d = rank_ - 1; d >= 0; --d) {
      if (dim(d) != 1 && stride(d) != expect) return false;
      expect = product(expect, dim(d));
    }
    return true;
  }

  void* raw() const { return data_; }
  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  // Pointer to element (i) of the first dimension, (i, j) of the first two. Null stays null: a view
  // of no elements may have rows but no memory.
  template <class T>
  T* row(std::int64_t i) const {
    return at<T>(i * stride_[0]);
  }
  template <class T>
  T* row(std::int64_t i, std::int64_t j) const {
    return at<T>(i * stride_[0] + j * stride_[1]);
  }
  template <class T>
  T* row(std::int64_t i, std::int64_t j, std::int64_t k) const {
    return at<T>(i * stride_[0] + j * stride_[1] + k * stride_[2]);
  }

  // The same shape and strides over other memory.
  TensorView with_data(void* data) const {
    TensorView v = *this;
    v.data_ = data;
    return v;
  }

  // The same memory with another stride in dimension `d` (a padded row, a slice of a wider tensor).
  TensorView with_stride(int d, std::int64_t elements) const {
    TensorView v = *this;
    v.stride_[static_cast<std::size_t>(d)] = elements;
    return v;
  }

 private:
  // Wraps instead of overflowing: a view of any shape can be made, the operations refuse the bad
  // ones.
  static std::int64_t product(std::int64_t a, std::int64_t b) {
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
  }

  template <class T>
  T* at(std::int64_t offset) const {
    return data_ == nullptr ? nullptr : data<T>() + offset;
  }

  void* data_ = nullptr;
  DType dtype_ = DType::kF32;
  int rank_ = 0;
  std::array<std::int64_t, kMaxRank> shape_{};
  std::array<std::int64_t, kMaxRank> stride_{};
};

}  // namespace snapmla
