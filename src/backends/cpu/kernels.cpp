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

HWY_EXPORT(ScaleAdd);
HWY_EXPORT(DecodeBf16);
HWY_EXPORT(DecodeE4m3);
HWY_EXPORT(TargetName);

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
