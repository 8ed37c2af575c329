// One element of a row: its arithmetic type and its conversions. A 16-bit result that would be
// subnormal as a bfloat16 (below 2^-126) becomes a zero, as the instruction of AVX-512 BF16 does.
#pragma once

#include "base/inline.h"
#include "logits/matrix.h"

namespace pyrl::logits {

template <typename Element>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <typename Element>
using Real = typename RealOf<Element>::type;

float widen_one(Float16 z);
float widen_one(BFloat16 z);
PYRL_INLINE float widen_one(float z) { return z; }
PYRL_INLINE double widen_one(double z) { return z; }

// To nearest even.
void narrow_one(float value, Float16* out);
void narrow_one(float value, BFloat16* out);
PYRL_INLINE void narrow_one(float value, float* out) { *out = value; }
PYRL_INLINE void narrow_one(double value, double* out) { *out = value; }

}  // namespace pyrl::logits
