// Building blocks of the SIMD kernels, compiled once per instruction set (Highway's toggled include
// guard): converting codes, reducing, exp2, and the two register tiles that every GEMM here uses.
//
// Bits: an element of a result is one chain of operations in a fixed order, whatever the shape of
// the tile that computed it. Tiles may therefore be cut in any way without changing a row.
#if defined(SNAPMLA_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SNAPMLA_CPU_SIMD_INL_H_
#undef SNAPMLA_CPU_SIMD_INL_H_
#else
#define SNAPMLA_CPU_SIMD_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "numeric/float_types.h"
#include "snapmla/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace snapmla::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 1 to 16 lanes: a 16-byte unit of a page holds 16 codes.
using DF = hn::CappedTag<float, 16>;
using DU = hn::RebindToUnsigned<DF>;
using VF = hn::Vec<DF>;

HWY_INLINE std::int64_t LanesF() { return static_cast<std::int64_t>(hn::Lanes(DF())); }

// Register tiles: rows x columns accumulators beside their operands, in 32 or 16 registers.
#if HWY_TARGET <= HWY_AVX3
inline constexpr int kTileRows = 8;
#else
inline constexpr int kTileRows = 4;
#endif
inline constexpr int kTileColumns = 3;

// PERF: keeps a loaded operand in its register. g++ 12 otherwise repeats the load as a memory
// operand of every multiply-add that uses it, and loads, not arithmetic, bound the tile.
HWY_INLINE void KeepInRegister(VF& v) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_SSE4 && HWY_COMPILER_GCC
#if HWY_TARGET <= HWY_AVX3
  asm("" : "+v"(v.raw));
#else
  asm("" : "+x"(v.raw));
#endif
#else
  (void)v;
#endif
}

// Calls fn(std::integral_constant<int, R>) with the largest of 8, 4, 2, 1 rows that fits, until
// `rows` are done; fn also gets the first row.
template <class Fn>
HWY_INLINE void ForRowTiles(std::int64_t rows, const Fn& fn) {
  std::int64_t r = 0;
  if constexpr (kTileRows >= 8) {
    for (; r + 8 <= rows; r += 8) fn(std::integral_constant<int, 8>(), r);
  }
  for (; r + 4 <= rows; r += 4) fn(std::integral_constant<int, 4>(), r);
  for (; r + 2 <= rows; r += 2) fn(std::integral_constant<int, 2>(), r);
  for (; r < rows; ++r) fn(std::integral_constant<int, 1>(), r);
}

template <class D>
HWY_INLINE hn::Vec<D> LoadBf16(D d, const BFloat16* from) {
  const hn::Rebind<std::uint16_t, D> d16;
  const auto* bits = reinterpret_cast<const std::uint16_t*>(from);
  const auto wide = hn::PromoteTo(hn::RebindToUnsigned<D>(), hn::LoadU(d16, bits));
  return hn::BitCast(d, hn::ShiftLeft<16>(wide));
}

// e4m3 codes as value * 2^-8: sign, exponent and mantissa moved to f16's places are exactly that,
// subnormals included; the processor widens f16. NaN codes become NaN.
inline constexpr float kE4m3Unscale = 256.0f;
template <class D>
HWY_INLINE hn::Vec<D> LoadE4m3Scaled(D d, const Float8E4M3* from) {
  const hn::Rebind<std::uint8_t, D> d8;
  const hn::Rebind<std::uint16_t, D> du16;
  const hn::Rebind<std::int16_t, D> di16;
  const hn::Rebind<hwy::float16_t, D> df16;
  const auto codes = hn::LoadU(d8, reinterpret_cast<const std::uint8_t*>(from));
  const auto high = hn::BitCast(di16, hn::ShiftLeft<8>(hn::PromoteTo(du16, codes)));
  const auto moved = hn::ShiftRight<1>(high);  // sign in bits 15 and 14, magnitude in 13..7
  const auto all_ones = hn::Set(di16, static_cast<std::int16_t>(0x3f80));
  const auto is_nan = hn::Eq(hn::And(moved, all_ones), all_ones);
  const auto bits = hn::And(moved, hn::Set(di16, static_cast<std::int16_t>(0xbf80)));
  const auto fixed = hn::IfThenElse(is_nan, hn::Set(di16, std::int16_t{0x7e00}), bits);
  return hn::PromoteTo(d, hn::BitCast(df16, fixed));
}

#if HWY_TARGET != HWY_SCALAR
// The sums of all lanes of four vectors, in the four lanes of one block.
HWY_INLINE hn::Vec<hn::Full128<float>> SumLanes4(VF a, VF b, VF c, VF d) {
  const DF df;
  const hn::RepartitionToWide<DU> d64;
  const VF ab = hn::Add(hn::InterleaveLower(df, a, b), hn::InterleaveUpper(df, a, b));
  const VF cd = hn::Add(hn::InterleaveLower(df, c, d), hn::InterleaveUpper(df, c, d));
  const auto x = hn::BitCast(d64, ab), y = hn::BitCast(d64, cd);
  const VF blocks = hn::Add(hn::BitCast(df, hn::InterleaveLower(d64, x, y)),
                            hn::BitCast(df, hn::InterleaveUpper(d64, x, y)));
#if HWY_MAX_BYTES >= 64
  const hn::Half<DF> half;
  const hn::Half<decltype(half)> quarter;
  const auto pair = hn::Add(hn::LowerHalf(half, blocks), hn::UpperHalf(half, blocks));
  return hn::Add(hn::LowerHalf(quarter, pair), hn::UpperHalf(quarter, pair));
#elif HWY_MAX_BYTES >= 32
  const hn::Half<DF> half;
  return hn::Add(hn::LowerHalf(half, blocks), hn::UpperHalf(half, blocks));
#else
  return blocks;
#endif
}
#endif

// The sums of R accumulators to out[0..R).
template <int R>
HWY_INLINE void StoreSums(const VF* acc, bool accumulate, float* HWY_RESTRICT out) {
#if HWY_TARGET == HWY_SCALAR
  for (int r = 0; r < R; ++r) {
    const float sum = hn::GetLane(acc[r]);
    out[r] = accumulate ? out[r] + sum : sum;
  }
#else
  const hn::Full128<float> d4;
  const VF zero = hn::Zero(DF());
  if constexpr (R >= 4) {
    for (int r = 0; r < R; r += 4) {
      auto sums = SumLanes4(acc[r], acc[r + 1], acc[r + 2], acc[r + 3]);
      if (accumulate) sums = hn::Add(hn::LoadU(d4, out + r), sums);
      hn::StoreU(sums, d4, out + r);
    }
  } else {
    float sums[4];
    hn::StoreU(SumLanes4(acc[0], R > 1 ? acc[1] : zero, zero, zero), d4, sums);
    for (int r = 0; r < R; ++r) out[r] = accumulate ? out[r] + sums[r] : sums[r];
  }
#endif
}

// out[c * out_stride + r] (+)= sum_k load_a(r, k) * b[c * b_stride + k] for R rows and C columns.
// load_a(r, k) gives the vector at k..k+lanes; scalar_a(r, k) one element, for what k leaves over.
template <int R, int C, class LoadA, class ScalarA>
HWY_INLINE void DotTile(const LoadA& load_a, const ScalarA& scalar_a, const float* HWY_RESTRICT b,
                        std::int64_t b_stride, std::int64_t k, bool accumulate,
                        float* HWY_RESTRICT out, std::int64_t out_stride) {
  const DF d;
  const std::int64_t lanes = LanesF(), whole = k - k % lanes;
  VF acc[C][R];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[c][r] = hn::Zero(d);
  }
  for (std::int64_t i = 0; i < whole; i += lanes) {
    VF x[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) x[c] = hn::LoadU(d, b + c * b_stride + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      VF y = load_a(r, i);
      KeepInRegister(y);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[c][r] = hn::MulAdd(y, x[c], acc[c][r]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) StoreSums<R>(acc[c], accumulate, out + c * out_stride);
  if (whole == k) return;
  for (int c = 0; c < C; ++c) {
    for (int r = 0; r < R; ++r) {
      float& sum = out[c * out_stride + r];
      for (std::int64_t i = whole; i < k; ++i) sum += scalar_a(r, i) * b[c * b_stride + i];
    }
  }
}

// out[c * out_stride + r] (+)= sum_k a[r * a_stride + k] * b[c * b_stride + k], for all rows r and
// columns c.
HWY_INLINE void DotRows(const float* HWY_RESTRICT a, std::int64_t a_stride, std::int64_t rows,
                        const float* HWY_RESTRICT b, std::int64_t b_stride, std::int64_t columns,
                        std::int64_t k, bool accumulate, float* HWY_RESTRICT out,
                        std::int64_t out_stride) {
  ForRowTiles(rows, [&](auto tile_rows, std::int64_t r0) {
    constexpr int R = decltype(tile_rows)::value;
    const float* a0 = a + r0 * a_stride;
    const auto load = [&](int r, std::int64_t i) { return hn::LoadU(DF(), a0 + r * a_stride + i); };
    const auto scalar = [&](int r, std::int64_t i) { return a0[r * a_stride + i]; };
    std::int64_t c = 0;
    for (; c + kTileColumns <= columns; c += kTileColumns) {
      DotTile<R, kTileColumns>(load, scalar, b + c * b_stride, b_stride, k, accumulate,
                               out + c * out_stride + r0, out_stride);
    }
    for (; c < columns; ++c) {
      DotTile<R, 1>(load, scalar, b + c * b_stride, b_stride, k, accumulate,
                    out + c * out_stride + r0, out_stride);
    }
  });
}

// 2^x for x <= 0: exact for whole numbers, within 1 ulp otherwise, 0 below -126, NaN for NaN.
HWY_INLINE VF Exp2NonPositive(VF x) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const VF least = hn::Set(d, -126.0f);
  const VF clamped = hn::Max(x, least);
  const VF whole = hn::Round(clamped);
  const VF f = hn::Sub(clamped, whole);  // -0.5 .. 0.5, exact
  // Taylor coefficients ln(2)^n / n!: the first left out is below 2^-27 at |f| = 0.5.
  VF p = hn::Set(d, 1.5252733804059841e-5f);
  p = hn::MulAdd(p, f, hn::Set(d, 1.5403530393381606e-4f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.3333558146428443e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 9.6181291076284772e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 5.5504108664821580e-2f));
  p = hn::MulAdd(p, f, hn::Set(d, 2.4022650695910072e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 6.9314718055994531e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::ConvertTo(di, whole));
  const VF value = hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
  const VF flushed = hn::IfThenZeroElse(hn::Lt(x, least), value);
  return hn::IfThenElse(hn::IsNaN(x), x, flushed);
}

// e4m3_to_float(e4m3_from_float(x)) for 0 <= x <= 448; NaN stays NaN.
HWY_INLINE VF RoundToE4m3(VF x) {
  const DF d;
  const DU du;
  const auto bits = hn::BitCast(du, x);
  const auto odd = hn::And(hn::ShiftRight<20>(bits), hn::Set(du, 1u));
  const auto rounded =
      hn::And(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7ffffu))), hn::Set(du, 0xfff00000u));
  const VF shift = hn::Set(d, 16384.0f);  // one ulp is 2^-9, the step of e4m3's subnormals
  const VF small = hn::Sub(hn::Add(x, shift), shift);
  const VF value = hn::IfThenElse(hn::Lt(x, hn::Set(d, 0x1p-6f)), small, hn::BitCast(d, rounded));
  return hn::IfThenElse(hn::IsNaN(x), x, value);
}

}  // namespace HWY_NAMESPACE
}  // namespace snapmla::cpu
HWY_AFTER_NAMESPACE();
#endif
