#include "backends/cpu/linear_kernels.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backends/cpu/linear_kernels.cpp"
#include <hwy/foreach_target.h>

#include <vector>

#include "backends/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace snapmla::cpu {
namespace HWY_NAMESPACE {

// Rows of a weight, a vector or an element at a time, as f32. Rows of one tile lie in one block of
// 128, hence share their scales.
struct F32Rows {
  const float* data;
  std::int64_t stride;
  VF load(int r, std::int64_t k) const { return hn::LoadU(DF(), data + r * stride + k); }
  float at(int r, std::int64_t k) const { return data[r * stride + k]; }
};
struct Bf16Rows {
  const BFloat16* data;
  std::int64_t stride;
  HWY_INLINE VF load(int r, std::int64_t k) const { return LoadBf16(DF(), data + r * stride + k); }
  float at(int r, std::int64_t k) const { return numeric::bf16_to_float(data[r * stride + k]); }
};
struct E4m3Rows {
  const Float8E4M3* data;
  std::int64_t stride;
  const float* scales;  // of the blocks of 128 columns
  HWY_INLINE VF load(int r, std::int64_t k) const {
    const VF scale = hn::Set(DF(), scales[k >> 7] * kE4m3Unscale);
    return hn::Mul(LoadE4m3Scaled(DF(), data + r * stride + k), scale);
  }
  float at(int r, std::int64_t k) const {
    return numeric::e4m3_to_float(data[r * stride + k]) * scales[k >> 7];
  }
};

struct Tokens {
  const float* x;
  std::int64_t x_stride, count, k;
  float* out;
  std::int64_t out_stride;
};

template <int R, class Rows>
HWY_INLINE void MultiplyTile(const Rows& rows, const Tokens& t, float* out) {
  const auto load = [&](int r, std::int64_t k) HWY_ATTR { return rows.load(r, k); };
  const auto scalar = [&](int r, std::int64_t k) { return rows.at(r, k); };
  std::int64_t i = 0;
  for (; i + kTileColumns <= t.count; i += kTileColumns) {
    DotTile<R, kTileColumns>(load, scalar, t.x + i * t.x_stride, t.x_stride, t.k, false,
                             out + i * t.out_stride, t.out_stride);
  }
  for (; i < t.count; ++i) {
    DotTile<R, 1>(load, scalar, t.x + i * t.x_stride, t.x_stride, t.k, false,
                  out + i * t.out_stride, t.out_stride);
  }
}

// From here on a tile of weights is used often enough that decoding it apart pays.
constexpr std::int64_t kShareFrom = 2 * kTileColumns;

template <class Rows>
HWY_INLINE void Multiply(Rows rows, std::int64_t features, const Tokens& t) {
  const std::int64_t lanes = LanesF(), whole = t.k - t.k % lanes;
  const auto* data = rows.data;
  ForRowTiles(features, [&](auto tile_rows, std::int64_t first) HWY_ATTR {
    constexpr int R = decltype(tile_rows)::value;
    rows.data = data + first * rows.stride;
    if (std::is_same_v<Rows, F32Rows> || t.count < kShareFrom) {
      MultiplyTile<R>(rows, t, t.out + first);
      return;
    }
    thread_local std::vector<float> decoded;
    decoded.resize(static_cast<std::size_t>(R * t.k));
    for (int r = 0; r < R; ++r) {
      float* to = decoded.data() + r * t.k;
      for (std::int64_t k = 0; k < whole; k += lanes) hn::StoreU(rows.load(r, k), DF(), to + k);
      for (std::int64_t k = whole; k < t.k; ++k) to[k] = rows.at(r, k);
    }
    MultiplyTile<R>(F32Rows{decoded.data(), t.k}, t, t.out + first);
  });
}

void LinearFeatures(const ops::Weight& w, std::int64_t first, std::int64_t last, const float* x,
                    std::int64_t x_stride, std::int64_t tokens, float* out,
                    std::int64_t out_stride) {
  const std::int64_t stride = w.data.stride(0);
  Tokens t{x, x_stride, tokens, w.in_features(), out, out_stride};
  if (w.data.dtype() == DType::kF32) {
    Multiply(F32Rows{w.data.row<float>(first), stride}, last - first, t);
  } else if (w.data.dtype() == DType::kBF16) {
    Multiply(Bf16Rows{w.data.row<BFloat16>(first), stride}, last - first, t);
  } else {
    for (std::int64_t end; first < last; first = end) {
      end = std::min(last, (first / 128 + 1) * 128);
      Multiply(E4m3Rows{w.data.row<Float8E4M3>(first), stride, w.scale_inv.row<float>(first / 128)},
               end - first, t);
      t.out += end - first;
    }
  }
}

void SwigluRow(const float* gate, const float* up, float* out, std::int64_t n) {
  const DF d;
  const std::int64_t lanes = LanesF();
  const VF one = hn::Set(d, 1.0f), minus_log2e = hn::Set(d, -1.44269504088896340736f);
  // silu(g) = g / (1 + e^-g), with e = e^-|g| so that nothing overflows.
  const auto silu_times = [&](VF g, VF u) HWY_ATTR {
    const VF e = Exp2NonPositive(hn::Mul(hn::Abs(g), minus_log2e));
    const VF top = hn::IfThenElse(hn::Lt(g, hn::Zero(d)), hn::Mul(g, e), g);
    return hn::Mul(hn::Div(top, hn::Add(one, e)), u);
  };
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(silu_times(hn::LoadU(d, gate + i), hn::LoadU(d, up + i)), d, out + i);
  for (; i < n; ++i) out[i] = hn::GetLane(silu_times(hn::Set(d, gate[i]), hn::Set(d, up[i])));
}

}  // namespace HWY_NAMESPACE
}  // namespace snapmla::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace snapmla::cpu {

HWY_EXPORT(LinearFeatures);
HWY_EXPORT(SwigluRow);

void linear_features(const ops::Weight& w, std::int64_t first, std::int64_t last, const float* x,
                     std::int64_t x_stride, std::int64_t tokens, float* out,
                     std::int64_t out_stride) {
  HWY_DYNAMIC_DISPATCH(LinearFeatures)(w, first, last, x, x_stride, tokens, out, out_stride);
}
void swiglu_row(const float* gate, const float* up, float* out, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(SwigluRow)(gate, up, out, n);
}

}  // namespace snapmla::cpu
#endif
