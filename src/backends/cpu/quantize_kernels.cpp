#include "backends/cpu/quantize_kernels.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backends/cpu/quantize_kernels.cpp"
#include <hwy/foreach_target.h>

#include "backends/cpu/simd-inl.h"
#include "numeric/scale.h"
#include "ops/rounding.h"

HWY_BEFORE_NAMESPACE();
namespace snapmla::cpu {
namespace HWY_NAMESPACE {

using VU = hn::Vec<DU>;

// Calls fn(load) where load(i) gives the vector of f32 at element i.
template <class Fn>
HWY_INLINE void WithLoader(const void* from, DType type, const Fn& fn) {
  if (type == DType::kF32) {
    fn([at = static_cast<const float*>(from)](std::int64_t i) { return hn::LoadU(DF(), at + i); });
  } else {
    fn([at = static_cast<const BFloat16*>(from)](std::int64_t i) {
      return LoadBf16(DF(), at + i);
    });
  }
}

// The bits of the largest magnitude: as integers, magnitudes are in the order of their values, and
// infinities and NaN come last.
HWY_INLINE std::uint32_t LargestMagnitude(const void* from, DType type, std::int64_t n) {
  const DU du;
  // Signed: magnitudes have a clear top bit, and SSE4's signed maximum is in the baseline too.
  const hn::RebindToSigned<DF> di;
  auto largest = hn::Zero(di);
  WithLoader(from, type, [&](const auto& load) {
    for (std::int64_t i = 0; i < n; i += LanesF()) {
      const VU magnitude = hn::And(hn::BitCast(du, load(i)), hn::Set(du, 0x7fffffffu));
      largest = hn::Max(largest, hn::BitCast(di, magnitude));
    }
  });
  return static_cast<std::uint32_t>(hn::GetLane(hn::MaxOfLanes(di, largest)));
}

float RowScale(const void* latent, DType latent_type, const void* rope, DType rope_type,
               ScaleMode mode) {
  const float latent_amax = numeric::float_of(LargestMagnitude(latent, latent_type, kKvLoraRank));
  const float rope_amax = numeric::float_of(LargestMagnitude(rope, rope_type, kQkRopeHeadDim));
  const bool finite = numeric::is_finite(latent_amax) && numeric::is_finite(rope_amax);
  return numeric::token_scale(latent_amax, rope_amax, finite, mode);
}

// numeric::e4m3_from_float in the low byte of each lane.
HWY_INLINE VU E4m3Codes(VF x) {
  const DF d;
  const DU du;
  const VU bits = hn::BitCast(du, x);
  const VU sign = hn::And(hn::ShiftRight<24>(bits), hn::Set(du, 0x80u));
  const VF magnitude = hn::Min(hn::Abs(x), hn::Set(d, numeric::kE4M3Max));
  const VU large = hn::BitCast(du, magnitude);
  const VU odd = hn::And(hn::ShiftRight<20>(large), hn::Set(du, 1u));
  const VU normal = hn::Sub(hn::ShiftRight<20>(hn::Add(large, hn::Add(odd, hn::Set(du, 0x7ffffu)))),
                            hn::Set(du, 960u));
  // Adding 2^14 rounds to a multiple of 2^-9, the step of subnormals.
  const VU subnormal =
      hn::And(hn::BitCast(du, hn::Add(magnitude, hn::Set(d, 16384.0f))), hn::Set(du, 0xffu));
  const auto is_small = hn::RebindMask(du, hn::Lt(magnitude, hn::Set(d, 0x1p-6f)));
  const VU code = hn::Or(sign, hn::IfThenElse(is_small, subnormal, normal));
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(x)), hn::Set(du, 0x7fu), code);
}

// numeric::bf16_from_float in the low half of each lane.
HWY_INLINE VU Bf16Bits(VF x) {
  const DU du;
  const VU bits = hn::BitCast(du, x);
  const VU odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const VU rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fffu))));
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(x)), hn::Set(du, 0x7fffu), rounded);
}

// Rows are 512 or 64 wide: always whole vectors.
void EncodeE4m3(const void* from, DType type, std::int64_t n, float scale, Float8E4M3* to) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<std::uint8_t, DF> d8;
  const VF divisor = hn::Set(d, scale);
  WithLoader(from, type, [&](const auto& load) {
    for (std::int64_t i = 0; i < n; i += LanesF()) {
      const auto codes = hn::BitCast(di, E4m3Codes(hn::Div(load(i), divisor)));
      hn::StoreU(hn::DemoteTo(d8, codes), d8, &to[i].bits);
    }
  });
}

void EncodeBf16(const void* from, DType type, std::int64_t n, float scale, BFloat16* to) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<std::uint16_t, DF> d16;
  const VF divisor = hn::Set(d, scale);
  WithLoader(from, type, [&](const auto& load) {
    for (std::int64_t i = 0; i < n; i += LanesF()) {
      const auto bits = hn::BitCast(di, Bf16Bits(hn::Div(load(i), divisor)));
      hn::StoreU(hn::DemoteTo(d16, bits), d16, &to[i].bits);
    }
  });
}

void EncodeF32(const void* from, DType type, std::int64_t n, float* to) {
  WithLoader(from, type, [&](const auto& load) {
    for (std::int64_t i = 0; i < n; i += LanesF()) hn::StoreU(load(i), DF(), to + i);
  });
}

// kCount rows at a time: what is read of the matrix serves all of them. No fused multiply-add: each
// product is rounded, as everywhere.
template <int kCount>
HWY_INLINE void SubtractFor(const float* errors, const float* rows, int width, float* targets) {
  const DF d;
  const auto lanes = static_cast<std::ptrdiff_t>(LanesF());
  const auto at = [&](int t, std::ptrdiff_t i) { return targets + t * kKvLoraRank + i; };
  for (std::ptrdiff_t i = 0; i < width; i += 2 * lanes) {
    VF low[kCount], high[kCount];
    for (int t = 0; t < kCount; ++t) {
      low[t] = hn::LoadU(d, at(t, i));
      high[t] = hn::LoadU(d, at(t, i + lanes));
    }
    const float* row = rows + i;
    for (int j = 0; j < ops::kFeedbackBlock; ++j, row += kKvLoraRank) {
      const VF x = hn::LoadU(d, row), y = hn::LoadU(d, row + lanes);
      for (int t = 0; t < kCount; ++t) {
        const VF e = hn::Set(d, errors[t * ops::kFeedbackBlock + j]);
        low[t] = hn::Sub(low[t], hn::Mul(e, x));
        high[t] = hn::Sub(high[t], hn::Mul(e, y));
      }
    }
    for (int t = 0; t < kCount; ++t) {
      hn::StoreU(low[t], d, at(t, i));
      hn::StoreU(high[t], d, at(t, i + lanes));
    }
  }
}

void SubtractErrors(int count, const float* errors, const float* rows, int width, float* targets) {
  static_assert(ops::kFeedbackRows == 4);
  if (count == 4) return SubtractFor<4>(errors, rows, width, targets);
  for (int t = 0; t < count; ++t)
    SubtractFor<1>(errors + t * ops::kFeedbackBlock, rows, width, targets + t * kKvLoraRank);
}

}  // namespace HWY_NAMESPACE
}  // namespace snapmla::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace snapmla::cpu {

HWY_EXPORT(RowScale);
HWY_EXPORT(EncodeE4m3);
HWY_EXPORT(EncodeBf16);
HWY_EXPORT(EncodeF32);
HWY_EXPORT(SubtractErrors);

float row_scale(const void* latent, DType latent_type, const void* rope, DType rope_type,
                ScaleMode mode) {
  return HWY_DYNAMIC_DISPATCH(RowScale)(latent, latent_type, rope, rope_type, mode);
}
void encode_e4m3(const void* from, DType type, std::int64_t n, float scale, Float8E4M3* to) {
  HWY_DYNAMIC_DISPATCH(EncodeE4m3)(from, type, n, scale, to);
}
void encode_bf16(const void* from, DType type, std::int64_t n, float scale, BFloat16* to) {
  HWY_DYNAMIC_DISPATCH(EncodeBf16)(from, type, n, scale, to);
}
void encode_f32(const void* from, DType type, std::int64_t n, float* to) {
  HWY_DYNAMIC_DISPATCH(EncodeF32)(from, type, n, to);
}
void subtract_errors(int count, const float* errors, const float* rows, int width, float* targets) {
  HWY_DYNAMIC_DISPATCH(SubtractErrors)(count, errors, rows, width, targets);
}

}  // namespace snapmla::cpu
#endif
