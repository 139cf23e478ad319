// Many divisions by one number: a reciprocal and four fused steps each, and the bits of a true
// division.
//
// With y = rn(1 / s), q0 = a y lies within a few ulps of a / s, q1 = rn(q0 + rn(a - s q0) y) within
// one, and then q2 = rn(q1 + (a - s q1) y) IS rn(a / s) (Markstein, IBM J. R&D 34(1), 1990), as
// long as a - s q is exact, which |a| >= 2^-100 guarantees. Below that the quotient by a scale of
// at least 2^-60 is under 2^-39: not exact, but zero for every e4m3 rounding.
#pragma once

#include <cmath>

#include "numeric/float_types.h"

namespace snapmla::numeric {

class Divider {
 public:
  // 2^-60 <= divisor <= 2^120, or NaN.
  SNAPMLA_HD explicit Divider(float divisor) : divisor_(divisor), reciprocal_(1.0f / divisor) {}

  // rn(a / divisor) for a = 0 and 2^-100 <= |a|, |a / divisor| <= 2^60; the sign of a always.
  SNAPMLA_HD float operator()(float a) const {
    const float q0 = a * reciprocal_;
    const float q1 = fmaf(fmaf(-q0, divisor_, a), reciprocal_, q0);
    const float q2 = fmaf(fmaf(-q1, divisor_, a), reciprocal_, q1);
    // The correction of a negative zero is a positive one.
    return float_of((bits_of(q2) & 0x7fffffffu) | (bits_of(a) & 0x80000000u));
  }

 private:
  float divisor_, reciprocal_;
};

}  // namespace snapmla::numeric
