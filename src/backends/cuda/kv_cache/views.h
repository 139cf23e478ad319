// What the cache kernels are given: plain strided views, checked on the host.
#pragma once

#include <cstdint>
#include <type_traits>

#include "backends/cuda/kv_cache/lane.h"
#include "base/check.h"
#include "snapmla/tensor.h"

namespace snapmla::cuda {

// Up to three leading dimensions of rows; strides in elements, 64-bit.
struct RowsView {
  std::uint8_t* data;
  std::int64_t stride[3];

  template <class T>
  SNAPMLA_HD T* at(std::int64_t i, std::int64_t j, std::int64_t k) const {
    return reinterpret_cast<T*>(data) + i * stride[0] + j * stride[1] + k * stride[2];
  }
};

// The rows of a tensor, or the single elements of q_scale_out. `alignment`: bytes that every row's
// start must be a multiple of.
inline RowsView rows_view(const char* name, const TensorView& t, int alignment) {
  const auto size = static_cast<std::int64_t>(size_of(t.dtype()));
  RowsView v{t.data<std::uint8_t>(), {0, 0, 0}};
  bool aligned = reinterpret_cast<std::uintptr_t>(t.raw()) % static_cast<unsigned>(alignment) == 0;
  for (int d = 0; d < t.rank() && d < 3; ++d) {
    v.stride[d] = t.stride(d);
    const bool is_row = d < t.rank() - 1;
    if (is_row && t.dim(d) > 1) aligned = aligned && t.stride(d) * size % alignment == 0;
  }
  require(aligned, name, "rows that are not aligned",
          str("rows that begin at multiples of ", alignment, " bytes").c_str());
  return v;
}

struct CacheParams {
  std::uint8_t *latent, *rope, *scale;
  std::int64_t latent_stride, rope_stride, scale_stride;  // bytes between pages
  PageImage image;

  SNAPMLA_HD PageRow row(std::int64_t page, int token) const {
    return PageRow{latent + page * latent_stride, rope + page * rope_stride,
                   reinterpret_cast<float*>(scale + page * scale_stride), token, image};
  }
};

inline CacheParams cache_params(const KvCacheView& c) {
  const auto aligned = [](const char* name, const void* plane, std::int64_t stride) {
    require(reinterpret_cast<std::uintptr_t>(plane) % 16 == 0 && stride % 16 == 0, name,
            str("base ", plane, ", page stride ", stride),
            "a base address and a page stride that are multiples of 16 bytes");
  };
  aligned("cache latent", c.latent, c.latent_page_stride);
  aligned("cache rope", c.rope, c.rope_page_stride);
  return CacheParams{
      c.latent, c.rope, c.scale, c.latent_page_stride, c.rope_page_stride, c.scale_page_stride,
      c.image};
}

// Calls fn with a value of the storage type of an f32 or bf16 tensor.
template <class Fn>
void dispatch_float(DType dtype, Fn&& fn) {
  if (dtype == DType::kBF16) {
    fn(BFloat16{});
  } else {
    fn(0.0f);
  }
}

template <class Fn>
void dispatch_format(KvCacheFormat format, Fn&& fn) {
  switch (format) {
    case KvCacheFormat::kFp8:
      return fn(std::integral_constant<KvCacheFormat, KvCacheFormat::kFp8>{});
    case KvCacheFormat::kBf16:
      return fn(std::integral_constant<KvCacheFormat, KvCacheFormat::kBf16>{});
    case KvCacheFormat::kF32:
      return fn(std::integral_constant<KvCacheFormat, KvCacheFormat::kF32>{});
  }
}

}  // namespace snapmla::cuda
