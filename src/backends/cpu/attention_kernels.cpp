#include "backends/cpu/attention_kernels.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backends/cpu/attention_kernels.cpp"
#include <hwy/foreach_target.h>

#include "backends/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace snapmla::cpu {
namespace HWY_NAMESPACE {

// One plane row of `width` elements of T, in vectors of at most the 16-byte unit that every page
// image keeps together. The units' places repeat every
// 128 bytes of a row.
template <class T, class Load>
HWY_INLINE void UnpackRow(const std::uint8_t* plane, PageImage image, std::int64_t width,
                          std::int64_t token, float* HWY_RESTRICT to, const Load& load) {
  constexpr std::int64_t kSize = sizeof(T), kUnit = 16 / kSize;
  const hn::CappedTag<float, kUnit> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const std::int64_t row_bytes = width * kSize;
  std::int64_t offset[8];
  for (std::int64_t u = 0; u < 8; ++u) offset[u] = element_offset(image, row_bytes, token, u * 16);
  const std::int64_t chunk_step = element_offset(image, row_bytes, 0, 128);
  for (std::int64_t chunk = 0; chunk < row_bytes / 128; ++chunk, plane += chunk_step) {
#pragma GCC unroll 8
    for (std::int64_t u = 0; u < 8; ++u) {
      const auto* unit = reinterpret_cast<const T*>(plane + offset[u]);
#pragma GCC unroll 8
      for (std::int64_t e = 0; e < kUnit; e += lanes)
        hn::StoreU(load(d, unit + e), d, to + u * kUnit + e);
    }
    to += 8 * kUnit;
  }
}

void LoadKeys(const KvCacheView& cache, std::int64_t page, std::int64_t first, std::int64_t count,
              float* HWY_RESTRICT to) {
  const std::uint8_t *latent = cache.latent_plane(page), *rope = cache.rope_plane(page);
  const PageImage image = cache.image;
  const auto e4m3 = [](auto d, const Float8E4M3* p) { return LoadE4m3Scaled(d, p); };
  const auto bf16 = [](auto d, const BFloat16* p) { return LoadBf16(d, p); };
  const auto f32 = [](auto d, const float* p) { return hn::LoadU(d, p); };
  for (std::int64_t t = first; t < first + count; ++t, to += kKeyWidth) {
    switch (cache.format) {
      case KvCacheFormat::kFp8:
        UnpackRow<Float8E4M3>(latent, image, kKvLoraRank, t, to, e4m3);
        UnpackRow<BFloat16>(rope, image, kQkRopeHeadDim, t, to + kKvLoraRank, bf16);
        break;
      case KvCacheFormat::kBf16:
        UnpackRow<BFloat16>(latent, image, kKvLoraRank, t, to, bf16);
        UnpackRow<BFloat16>(rope, image, kQkRopeHeadDim, t, to + kKvLoraRank, bf16);
        break;
      case KvCacheFormat::kF32:
        UnpackRow<float>(latent, image, kKvLoraRank, t, to, f32);
        UnpackRow<float>(rope, image, kQkRopeHeadDim, t, to + kKvLoraRank, f32);
        break;
    }
  }
}

void Scores(const float* q, std::int64_t q_stride, std::int64_t rows, const float* keys,
            std::int64_t key_stride, std::int64_t tokens, std::int64_t k, bool accumulate,
            float* s) {
  DotRows(q, q_stride, rows, keys, key_stride, tokens, k, accumulate, s, kRowLanes);
}

void Softmax(RowBlock& block, std::int64_t tokens, const float* scale, const float* log2_scale,
             bool quantise, float* HWY_RESTRICT s) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const std::int64_t lanes = LanesF();
  HWY_ALIGN float maximum[kRowLanes], has_nan[kRowLanes], sum[kRowLanes];
  const VF minus_inf = hn::Set(d, -HUGE_VALF), one = hn::Set(d, 1.0f);
  for (std::int64_t r = 0; r < block.rows; r += lanes) {
    const VF factor = hn::LoadU(d, block.factor + r);
    const auto visible = hn::LoadU(di, block.visible + r);
    VF m = minus_inf, nan = hn::Zero(d);
    for (std::int64_t j = 0; j < tokens; ++j) {
      VF y = hn::LoadU(d, s + j * kRowLanes + r);
      if (scale) {
        y = hn::Add(hn::Mul(hn::Mul(y, hn::Set(d, scale[j])), factor), hn::Set(d, log2_scale[j]));
      } else {
        y = hn::Mul(y, factor);
      }
      const auto seen = hn::Gt(visible, hn::Set(di, static_cast<std::int32_t>(j)));
      y = hn::IfThenElse(hn::RebindMask(d, seen), y, minus_inf);
      const auto is_nan = hn::IsNaN(y);
      nan = hn::IfThenElse(is_nan, one, nan);
      m = hn::Max(m, hn::IfThenElse(is_nan, minus_inf, y));
      hn::StoreU(y, d, s + j * kRowLanes + r);
    }
    hn::StoreU(m, d, maximum + r);
    hn::StoreU(nan, d, has_nan + r);
  }
  for (std::int64_t r = 0; r < block.rows; ++r) {
    const numeric::BlockFactors f =
        numeric::begin_block(block.state[r], maximum[r], has_nan[r] != 0.0f);
    block.rescale[r] = f.rescale;
    block.sigma[r] = f.sigma;
    maximum[r] = f.maximum;
    if (f.skip) block.visible[r] = 0;
  }
  for (std::int64_t r = block.rows; r < kRowLanes; ++r) maximum[r] = 0.0f;
  const VF largest = hn::Set(d, numeric::kE4M3Max);
  for (std::int64_t r = 0; r < block.rows; r += lanes) {
    const VF m = hn::LoadU(d, maximum + r);
    VF total = hn::Zero(d);
    for (std::int64_t j = 0; j < tokens; ++j) {
      float* at = s + j * kRowLanes + r;
      VF p = hn::Mul(largest, Exp2NonPositive(hn::Sub(hn::LoadU(d, at), m)));
      if (quantise) p = RoundToE4m3(p);
      VF term = p;
      // A masked token has p = 0, and a scale that may be NaN.
      if (scale)
        term = hn::IfThenZeroElse(hn::Eq(p, hn::Zero(d)), hn::Div(p, hn::Set(d, scale[j])));
      total = hn::Add(total, term);
      hn::StoreU(p, d, at);
    }
    hn::StoreU(total, d, sum + r);
  }
  for (std::int64_t r = 0; r < block.rows; ++r) block.state[r].sum += block.sigma[r] * sum[r];
}

// How a tile of O ends: T is kept for more tokens, or O = O * rescale + sigma * T.
struct ValueEnd {
  bool finish;
  const float *rescale, *sigma;  // [rows]
  float unscale;
  float* out;
  std::int64_t out_stride;
};

// T (+)= sum_j p[j * 16 + r] * v[j * v_stride + d] for R rows and C vectors of columns.
template <int R, int C>
HWY_INLINE void ValueTile(const float* HWY_RESTRICT p, const float* HWY_RESTRICT v,
                          std::int64_t v_stride, std::int64_t tokens, bool from_zero, float* t,
                          std::int64_t t_stride, const ValueEnd& end) {
  const DF d;
  const std::int64_t lanes = LanesF();
  VF acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      acc[r][c] = from_zero ? hn::Zero(d) : hn::LoadU(d, t + r * t_stride + c * lanes);
  }
  for (std::int64_t j = 0; j < tokens; ++j) {
    VF x[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) x[c] = hn::LoadU(d, v + j * v_stride + c * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      VF y = hn::Set(d, p[j * kRowLanes + r]);
      KeepInRegister(y);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = hn::MulAdd(y, x[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (!end.finish) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) hn::StoreU(acc[r][c], d, t + r * t_stride + c * lanes);
      continue;
    }
    const VF rescale = hn::Set(d, end.rescale[r]), sigma = hn::Set(d, end.sigma[r] * end.unscale);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* o = end.out + r * end.out_stride + c * lanes;
      hn::StoreU(hn::MulAdd(sigma, acc[r][c], hn::Mul(hn::LoadU(d, o), rescale)), d, o);
    }
  }
}

template <int R>
HWY_INLINE void ValueRows(const float* p, const float* v, std::int64_t v_stride,
                          std::int64_t tokens, std::int64_t width, bool from_zero, float* t,
                          std::int64_t t_stride, const ValueEnd& end) {
  const std::int64_t lanes = LanesF();
  ValueEnd at = end;
  std::int64_t d = 0;
  for (; d + kTileColumns * lanes <= width; d += kTileColumns * lanes) {
    at.out = end.out + d;
    ValueTile<R, kTileColumns>(p, v + d, v_stride, tokens, from_zero, t + d, t_stride, at);
  }
  for (; d + 2 * lanes <= width; d += 2 * lanes) {
    at.out = end.out + d;
    ValueTile<R, 2>(p, v + d, v_stride, tokens, from_zero, t + d, t_stride, at);
  }
  for (; d + lanes <= width; d += lanes) {
    at.out = end.out + d;
    ValueTile<R, 1>(p, v + d, v_stride, tokens, from_zero, t + d, t_stride, at);
  }
  for (; d < width; ++d) {
    for (int r = 0; r < R; ++r) {
      float sum = from_zero ? 0.0f : t[r * t_stride + d];
      for (std::int64_t j = 0; j < tokens; ++j) sum += p[j * kRowLanes + r] * v[j * v_stride + d];
      float& o = end.out[r * end.out_stride + d];
      if (end.finish) {
        o = o * end.rescale[r] + end.sigma[r] * end.unscale * sum;
      } else {
        t[r * t_stride + d] = sum;
      }
    }
  }
}

// One accumulator for the whole split: O takes the rescaling and P the factor sigma beforehand.
void PrepareOneLevel(const RowBlock& block, float* p, std::int64_t width, float unscale, float* out,
                     std::int64_t out_stride) {
  for (std::int64_t r = 0; r < block.rows; ++r) {
    for (std::int64_t j = 0; j < block.visible[r]; ++j)
      p[j * kRowLanes + r] *= block.sigma[r] * unscale;
    if (block.rescale[r] == 1.0f) continue;
    for (std::int64_t d = 0; d < width; ++d) out[r * out_stride + d] *= block.rescale[r];
  }
}

void Values(const RowBlock& block, float* p, const float* v, std::int64_t v_stride,
            std::int64_t width, float unscale, bool one_level, float* scratch, float* out,
            std::int64_t out_stride) {
  if (one_level) PrepareOneLevel(block, p, width, unscale, out, out_stride);
  ForRowTiles(block.rows, [&](auto tile_rows, std::int64_t r0) {
    constexpr int R = decltype(tile_rows)::value;
    const std::int32_t* visible = block.visible + r0;
    const auto [least, most] = std::minmax_element(visible, visible + R);
    if (*most == 0) return;
    float* o = out + r0 * out_stride;
    float* t = one_level ? o : scratch + r0 * width;
    const std::int64_t t_stride = one_level ? out_stride : width;
    ValueEnd end{!one_level && *least == *most,
                 block.rescale + r0,
                 block.sigma + r0,
                 unscale,
                 o,
                 out_stride};
    // What all rows see goes through the tile; the rest row by row, because a masked token may be
    // NaN and 0 * NaN would spread it.
    ValueRows<R>(p + r0, v, v_stride, *least, width, !one_level, t, t_stride, end);
    if (*least == *most) return;
    for (int r = 0; r < R; ++r) {
      const ValueEnd row{!one_level, end.rescale + r,    end.sigma + r,
                         unscale,    o + r * out_stride, out_stride};
      ValueRows<1>(p + r0 + r + *least * kRowLanes, v + *least * v_stride, v_stride,
                   visible[r] - *least, width, false, t + r * t_stride, t_stride, row);
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace snapmla::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace snapmla::cpu {

HWY_EXPORT(LoadKeys);
HWY_EXPORT(Scores);
HWY_EXPORT(Softmax);
HWY_EXPORT(Values);

void load_keys(const KvCacheView& cache, std::int64_t page, std::int64_t first, std::int64_t count,
               float* to) {
  HWY_DYNAMIC_DISPATCH(LoadKeys)(cache, page, first, count, to);
}
float latent_unscale(KvCacheFormat format) {
  return format == KvCacheFormat::kFp8 ? HWY_NAMESPACE::kE4m3Unscale : 1.0f;
}
void scores(const float* q, std::int64_t q_stride, std::int64_t rows, const float* keys,
            std::int64_t key_stride, std::int64_t tokens, std::int64_t k, bool accumulate,
            float* s) {
  HWY_DYNAMIC_DISPATCH(Scores)(q, q_stride, rows, keys, key_stride, tokens, k, accumulate, s);
}
void softmax(RowBlock& block, std::int64_t tokens, const float* scale, const float* log2_scale,
             bool quantise, float* s) {
  HWY_DYNAMIC_DISPATCH(Softmax)(block, tokens, scale, log2_scale, quantise, s);
}
void values(const RowBlock& block, float* p, const float* v, std::int64_t v_stride,
            std::int64_t width, float unscale, bool one_level, float* scratch, float* out,
            std::int64_t out_stride) {
  HWY_DYNAMIC_DISPATCH(Values)
  (block, p, v, v_stride, width, unscale, one_level, scratch, out, out_stride);
}

}  // namespace snapmla::cpu
#endif
