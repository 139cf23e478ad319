// Memory for operands: strided tensors whose gaps and surroundings must stay as they were, and
// caches in one pool or in three separate tensors.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "snapmla/kv_cache.h"
#include "snapmla/tensor.h"

namespace snapmla::agreement {

// A tensor in its own block of bytes. Elements start as 0xff bytes (NaN, or ids of -1), the gaps
// between rows and a band on either side as 0xa5.
template <class T>
class Operand {
 public:
  // padded: rows of every dimension but the last are up to 7 elements apart.
  Operand(std::vector<std::int64_t> shape, bool padded, std::mt19937& rng)
      : shape_(std::move(shape)), strides_(shape_.size(), 1) {
    for (std::size_t d = shape_.size() - 1; d-- > 0;) {
      strides_[d] = strides_[d + 1] * std::max<std::int64_t>(shape_[d + 1], 1) +
                    (padded ? static_cast<std::int64_t>(rng() % 8) : 0);
    }
    const std::int64_t extent = shape_[0] * strides_[0];
    bytes_.assign(static_cast<std::size_t>(extent + 2 * kBand) * sizeof(T), 0xa5);
    each(
        [this](std::int64_t at) { std::memset(static_cast<void*>(&data()[at]), 0xff, sizeof(T)); });
  }

  T* data() { return reinterpret_cast<T*>(bytes_.data()) + kBand; }
  T& operator[](std::int64_t i) { return data()[offset(i)]; }  // i counts elements, row-major

  TensorView view() {
    const auto& s = shape_;
    TensorView v = s.size() == 1   ? TensorView::of(data(), {s[0]})
                   : s.size() == 2 ? TensorView::of(data(), {s[0], s[1]})
                   : s.size() == 3 ? TensorView::of(data(), {s[0], s[1], s[2]})
                                   : TensorView::of(data(), {s[0], s[1], s[2], s[3]});
    for (std::size_t d = 0; d + 1 < s.size(); ++d)
      v = v.with_stride(static_cast<int>(d), strides_[d]);
    return v;
  }

  std::int64_t numel() const {
    std::int64_t n = 1;
    for (std::int64_t extent : shape_) n *= extent;
    return n;
  }

  std::vector<T> values() {
    std::vector<T> all;
    each([&](std::int64_t at) { all.push_back(data()[at]); });
    return all;
  }

  // Nothing but the elements was written.
  void expect_surroundings_untouched(const char* name) {
    std::vector<std::uint8_t> copy = bytes_;
    each([&](std::int64_t at) {
      std::memset(copy.data() + static_cast<std::size_t>(at + kBand) * sizeof(T), 0xa5, sizeof(T));
    });
    for (std::size_t i = 0; i < copy.size(); ++i) {
      if (copy[i] == 0xa5) continue;
      ADD_FAILURE() << name << " was written outside its elements, at byte "
                    << static_cast<std::int64_t>(i) - kBand * static_cast<std::int64_t>(sizeof(T));
      return;
    }
  }

 private:
  static constexpr std::int64_t kBand = 64;

  std::int64_t offset(std::int64_t i) const {
    std::int64_t at = 0;
    for (std::size_t d = shape_.size(); d-- > 0; i /= shape_[d]) at += i % shape_[d] * strides_[d];
    return at;
  }
  template <class F>
  void each(F f) {
    for (std::int64_t i = 0, n = numel(); i < n; ++i) f(offset(i));
  }

  std::vector<std::int64_t> shape_, strides_;
  std::vector<std::uint8_t> bytes_;
};

// Pages full of 0xff (NaN) in one pool, or in three tensors with gaps between the pages.
class Cache {
 public:
  Cache(KvCacheFormat format, PageImage image, bool separate, std::int64_t num_pages)
      : layout_(page_layout(format)) {
    if (!separate) {
      planes_[0].assign(static_cast<std::size_t>(num_pages * layout_.page_bytes), 0xff);
      view_ = KvCacheView::of_pool(planes_[0].data(), num_pages, format, image);
      return;
    }
    const std::int64_t latent = layout_.rope_offset, rope = layout_.scale_offset - latent;
    const std::int64_t strides[] = {latent + 12, rope + 1028, layout_.has_scale ? 256 + 4 : 0};
    for (int i = 0; i < 3; ++i)
      planes_[i].assign(static_cast<std::size_t>(num_pages * strides[i]), 0xff);
    view_ = KvCacheView{format,
                        image,
                        num_pages,
                        planes_[0].data(),
                        planes_[1].data(),
                        layout_.has_scale ? planes_[2].data() : nullptr,
                        strides[0],
                        strides[1],
                        strides[2]};
  }

  const KvCacheView& view() const { return view_; }
  const PageLayout& layout() const { return layout_; }
  // All bytes, gaps included.
  std::vector<std::uint8_t> bytes() const {
    std::vector<std::uint8_t> all;
    for (const auto& p : planes_) all.insert(all.end(), p.begin(), p.end());
    return all;
  }

 private:
  PageLayout layout_;
  std::vector<std::uint8_t> planes_[3];
  KvCacheView view_;
};

}  // namespace snapmla::agreement
