#include "backends/cpu/kernels.h"

// AVX-512, AVX2 and SSE4 plus the baseline: more targets only make the build longer.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backends/cpu/kernels.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace snapmla::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// One product of two vectors in two chains, then the tail: the same order of additions for every
// caller.
HWY_INLINE float Dot(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, std::int64_t k) {
  const DF d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  VF s0 = hn::Zero(d), s1 = hn::Zero(d);
  std::int64_t i = 0;
  for (; i + 2 * lanes <= k; i += 2 * lanes) {
    s0 = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), s0);
    s1 = hn::MulAdd(hn::LoadU(d, a + i + lanes), hn::LoadU(d, b + i + lanes), s1);
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(s0, s1)));
  for (; i < k; ++i) sum += a[i] * b[i];
  return sum;
}

// Four products that share b. Each keeps Dot's order, so grouping never changes a bit.
HWY_INLINE void Dot4(const float* HWY_RESTRICT a, std::int64_t stride, const float* HWY_RESTRICT b,
                     std::int64_t k, float* HWY_RESTRICT out) {
  const DF d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const float *a0 = a, *a1 = a + stride, *a2 = a + 2 * stride, *a3 = a + 3 * stride;
  VF s00 = hn::Zero(d), s01 = s00, s10 = s00, s11 = s00, s20 = s00, s21 = s00, s30 = s00, s31 = s00;
  std::int64_t i = 0;
  for (; i + 2 * lanes <= k; i += 2 * lanes) {
    const VF x = hn::LoadU(d, b + i), y = hn::LoadU(d, b + i + lanes);
    s00 = hn::MulAdd(hn::LoadU(d, a0 + i), x, s00);
    s01 = hn::MulAdd(hn::LoadU(d, a0 + i + lanes), y, s01);
    s10 = hn::MulAdd(hn::LoadU(d, a1 + i), x, s10);
    s11 = hn::MulAdd(hn::LoadU(d, a1 + i + lanes), y, s11);
    s20 = hn::MulAdd(hn::LoadU(d, a2 + i), x, s20);
    s21 = hn::MulAdd(hn::LoadU(d, a2 + i + lanes), y, s21);
    s30 = hn::MulAdd(hn::LoadU(d, a3 + i), x, s30);
    s31 = hn::MulAdd(hn::LoadU(d, a3 + i + lanes), y, s31);
  }
  out[0] = hn::GetLane(hn::SumOfLanes(d, hn::Add(s00, s01)));
  out[1] = hn::GetLane(hn::SumOfLanes(d, hn::Add(s10, s11)));
  out[2] = hn::GetLane(hn::SumOfLanes(d, hn::Add(s20, s21)));
  out[3] = hn::GetLane(hn::SumOfLanes(d, hn::Add(s30, s31)));
  for (; i < k; ++i) {
    out[0] += a0[i] * b[i];
    out[1] += a1[i] * b[i];
    out[2] += a2[i] * b[i];
    out[3] += a3[i] * b[i];
  }
}

void DotMany(const float* b, const float* a, std::int64_t stride, std::int64_t k, std::int64_t rows,
             float* out) {
  std::int64_t r = 0;
  for (; r + 4 <= rows; r += 4) Dot4(a + r * stride, stride, b, k, out + r);
  for (; r < rows; ++r) out[r] = Dot(a + r * stride, b, k);
}

void ScaleAdd(float* y, const float* x, float rescale, float factor, std::int64_t n) {
  const DF d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const VF r = hn::Set(d, rescale), f = hn::Set(d, factor);
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::MulAdd(f, hn::LoadU(d, x + i), hn::Mul(hn::LoadU(d, y + i), r)), d, y + i);
  }
  for (; i < n; ++i) y[i] = y[i] * rescale + factor * x[i];
}

void DecodeBf16(const BFloat16* from, float* to, std::int64_t n) {
  const DF d;
  const hn::Rebind<std::uint32_t, DF> du;
  const hn::Rebind<std::uint16_t, DF> d16;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto* bits = reinterpret_cast<const std::uint16_t*>(from);
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto wide = hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(d16, bits + i)));
    hn::StoreU(hn::BitCast(d, wide), d, to + i);
  }
  for (; i < n; ++i) {
    const std::uint32_t word = static_cast<std::uint32_t>(bits[i]) << 16;
    __builtin_memcpy(to + i, &word, 4);
  }
}

// Exponent and mantissa moved to f32's place give the value times 2^-120, subnormals included; one
// multiply by 2^120 * scale finishes. The two NaN codes need a select.
void DecodeE4m3(const Float8E4M3* from, float scale, float* to, std::int64_t n) {
  const DF d;
  const hn::Rebind<std::uint32_t, DF> du;
  const hn::Rebind<std::uint8_t, DF> d8;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto* codes = reinterpret_cast<const std::uint8_t*>(from);
  const VF unbias = hn::Set(d, 0x1p120f), factor = hn::Set(d, scale);
  const VF nan = hn::BitCast(d, hn::Set(du, 0x7fc00000u));
  const auto low = hn::Set(du, 0x7fu), sign = hn::Set(du, 0x80u);
  const auto convert = [&](auto code) {
    const auto magnitude = hn::And(code, low);
    const auto bits = hn::Or(hn::ShiftLeft<20>(magnitude), hn::ShiftLeft<24>(hn::And(code, sign)));
    const VF value = hn::Mul(hn::BitCast(d, bits), unbias);
    return hn::Mul(hn::IfThenElse(hn::RebindMask(d, hn::Eq(magnitude, low)), nan, value), factor);
  };
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(convert(hn::PromoteTo(du, hn::LoadU(d8, codes + i))), d, to + i);
  for (; i < n; ++i) to[i] = hn::GetLane(convert(hn::Set(du, codes[i])));
}

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace snapmla::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace snapmla::cpu {

HWY_EXPORT(DotMany);
HWY_EXPORT(ScaleAdd);
HWY_EXPORT(DecodeBf16);
HWY_EXPORT(DecodeE4m3);
HWY_EXPORT(TargetName);

void dot_rows(const float* x, const float* w, std::int64_t stride, std::int64_t k,
              std::int64_t rows, float* out) {
  HWY_DYNAMIC_DISPATCH(DotMany)(x, w, stride, k, rows, out);
}
void dot_tokens(const float* x, std::int64_t x_stride, const float* w, std::int64_t k,
                std::int64_t tokens, float* out) {
  HWY_DYNAMIC_DISPATCH(DotMany)(w, x, x_stride, k, tokens, out);
}
void scale_add(float* y, const float* x, float rescale, float factor, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(ScaleAdd)(y, x, rescale, factor, n);
}
void decode_bf16(const BFloat16* from, float* to, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(DecodeBf16)(from, to, n);
}
void decode_e4m3(const Float8E4M3* from, float scale, float* to, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(DecodeE4m3)(from, scale, to, n);
}
const char* simd_target() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

}  // namespace snapmla::cpu
#endif
