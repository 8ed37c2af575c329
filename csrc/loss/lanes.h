// Eight doubles at once, in as many registers as the instruction set needs: a Real of
// policy_math.h, element by element the same operations and bits as a double. Included by the files
// of one instruction set each.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __FMA__
#include <immintrin.h>
#endif

#include "loss/column.h"
#include "loss/math.h"

namespace pyrl::loss {
namespace {

#if defined(__AVX512F__)
inline constexpr int kWidth = 8;
#elif defined(__AVX__)
inline constexpr int kWidth = 4;
#else
inline constexpr int kWidth = 2;
#endif
inline constexpr int kParts = kLanes / kWidth;

using Doubles = double __attribute__((vector_size(8 * kWidth)));
using Floats = float __attribute__((vector_size(4 * kWidth)));
using Integers = std::uint64_t __attribute__((vector_size(8 * kWidth)));

#ifdef __AVX512F__
using Flags = __mmask8;
PYRL_INLINE Flags less(Doubles a, Doubles b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
PYRL_INLINE Flags equal(Doubles a, Doubles b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
PYRL_INLINE Flags unequal(Doubles a, Doubles b) { return _mm512_cmp_pd_mask(a, b, _CMP_NEQ_UQ); }
PYRL_INLINE Doubles choose(Flags flags, Doubles yes, Doubles no) {
  return _mm512_mask_blend_pd(flags, no, yes);
}
// a < b ? b : a and b < a ? b : a, NaN included.
PYRL_INLINE Doubles most(Doubles a, Doubles b) { return _mm512_max_pd(b, a); }
PYRL_INLINE Doubles least(Doubles a, Doubles b) { return _mm512_min_pd(b, a); }
PYRL_INLINE Doubles multiplied_added(Doubles a, Doubles b, Doubles c) {
  return _mm512_fmadd_pd(a, b, c);
}
PYRL_INLINE Doubles widened(Floats values) { return _mm512_cvtps_pd(values); }
PYRL_INLINE Floats narrowed(Doubles values) { return _mm512_cvtpd_ps(values); }
#else
using Flags = std::int64_t __attribute__((vector_size(8 * kWidth)));
PYRL_INLINE Flags less(Doubles a, Doubles b) { return a < b; }
PYRL_INLINE Flags equal(Doubles a, Doubles b) { return a == b; }
PYRL_INLINE Flags unequal(Doubles a, Doubles b) { return a != b; }
PYRL_INLINE Doubles choose(Flags flags, Doubles yes, Doubles no) { return flags ? yes : no; }
PYRL_INLINE Doubles most(Doubles a, Doubles b) { return a < b ? b : a; }
PYRL_INLINE Doubles least(Doubles a, Doubles b) { return b < a ? b : a; }
PYRL_INLINE Doubles multiplied_added(Doubles a, Doubles b, Doubles c) {
#ifdef __FMA__
  return _mm256_fmadd_pd(a, b, c);
#else
  for (int i = 0; i < kWidth; ++i) a[i] = std::fma(a[i], b[i], c[i]);
  return a;
#endif
}
PYRL_INLINE Doubles widened(Floats values) { return __builtin_convertvector(values, Doubles); }
PYRL_INLINE Floats narrowed(Doubles values) { return __builtin_convertvector(values, Floats); }
#endif

struct Mask {
  Flags part[kParts];
};

struct Lanes {
  Doubles part[kParts];

  Lanes() = default;
  PYRL_INLINE Lanes(double x) {  // in every lane
    for (Doubles& p : part) p = x - Doubles{};
  }
};

// One operation per part.
#define PYRL_EACH_PART(Result, expression)                      \
  Result result;                                                \
  for (int k = 0; k < kParts; ++k) result.part[k] = expression; \
  return result

PYRL_INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
  PYRL_EACH_PART(Lanes, a.part[k] + b.part[k]);
}
PYRL_INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
  PYRL_EACH_PART(Lanes, a.part[k] - b.part[k]);
}
PYRL_INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
  PYRL_EACH_PART(Lanes, a.part[k] * b.part[k]);
}
PYRL_INLINE Lanes operator/(const Lanes& a, const Lanes& b) {
  PYRL_EACH_PART(Lanes, a.part[k] / b.part[k]);
}
PYRL_INLINE Lanes operator-(const Lanes& a) { PYRL_EACH_PART(Lanes, -a.part[k]); }
PYRL_INLINE Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
  PYRL_EACH_PART(Lanes, multiplied_added(a.part[k], b.part[k], c.part[k]));
}

PYRL_INLINE Mask operator<(const Lanes& a, const Lanes& b) {
  PYRL_EACH_PART(Mask, less(a.part[k], b.part[k]));
}
PYRL_INLINE Mask operator>(const Lanes& a, const Lanes& b) { return b < a; }
PYRL_INLINE Mask operator==(const Lanes& a, const Lanes& b) {
  PYRL_EACH_PART(Mask, equal(a.part[k], b.part[k]));
}
PYRL_INLINE Mask operator!=(const Lanes& a, const Lanes& b) {
  PYRL_EACH_PART(Mask, unequal(a.part[k], b.part[k]));
}
PYRL_INLINE Mask operator!(const Mask& a) { PYRL_EACH_PART(Mask, static_cast<Flags>(~a.part[k])); }
PYRL_INLINE Mask operator&(const Mask& a, const Mask& b) {
  PYRL_EACH_PART(Mask, static_cast<Flags>(a.part[k] & b.part[k]));
}
PYRL_INLINE Mask operator|(const Mask& a, const Mask& b) {
  PYRL_EACH_PART(Mask, static_cast<Flags>(a.part[k] | b.part[k]));
}

PYRL_INLINE Mask operator^(const Mask& a, const Mask& b) {
  PYRL_EACH_PART(Mask, static_cast<Flags>(a.part[k] ^ b.part[k]));
}

PYRL_INLINE Lanes select(const Mask& mask, const Lanes& yes, const Lanes& no) {
  PYRL_EACH_PART(Lanes, choose(mask.part[k], yes.part[k], no.part[k]));
}

PYRL_INLINE Lanes larger(const Lanes& a, const Lanes& b) {
  PYRL_EACH_PART(Lanes, most(a.part[k], b.part[k]));
}
PYRL_INLINE Lanes smaller(const Lanes& a, const Lanes& b) {
  PYRL_EACH_PART(Lanes, least(a.part[k], b.part[k]));
}

PYRL_INLINE Lanes power_of_two(const Lanes& shifted) {
  PYRL_EACH_PART(Lanes, (Doubles)((Integers)shifted.part[k] << 52));
}

PYRL_INLINE Scientific<Lanes> scientific(const Lanes& x) {
  Scientific<Lanes> parts;
  for (int k = 0; k < kParts; ++k) {
    const Integers bits = (Integers)x.part[k];
    const Integers biased = (bits + kRootBits) >> 52;
    parts.mantissa.part[k] = (Doubles)(bits - ((biased - 1023) << 52));
    parts.exponent.part[k] = (Doubles)(biased + 0x4330000000000000) - (0x1p52 + 1023.0);
  }
  return parts;
}

#undef PYRL_EACH_PART

PYRL_INLINE Lanes load(const double* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

PYRL_INLINE Lanes load(const float* from) {
  Lanes lanes;
  for (int k = 0; k < kParts; ++k) {
    Floats part;
    std::memcpy(&part, from + k * kWidth, sizeof part);
    lanes.part[k] = widened(part);
  }
  return lanes;
}

PYRL_INLINE void store(const Lanes& lanes, double* to) { std::memcpy(to, &lanes, sizeof lanes); }

PYRL_INLINE void store(const Lanes& lanes, float* to) {
  for (int k = 0; k < kParts; ++k) {
    const Floats part = narrowed(lanes.part[k]);
    std::memcpy(to + k * kWidth, &part, sizeof part);
  }
}

}  // namespace
}  // namespace pyrl::loss
