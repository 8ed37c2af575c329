// exp, expm1 and log in double from additions, products, fma and selects alone, so that every
// instruction set, and every number of tokens, gives the same bits. C++17, also nvcc.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "base/inline.h"

#ifndef PYRL_HD
#ifdef __CUDACC__
#define PYRL_HD __host__ __device__
#else
#define PYRL_HD
#endif
#endif

namespace pyrl::loss {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What the templates below need of a Real, which is a double or several (policy_lanes.h).
PYRL_INLINE double select(bool flag, double yes, double no) { return flag ? yes : no; }
// a b + c, rounded once.
PYRL_INLINE double fused(double a, double b, double c) { return std::fma(a, b, c); }

inline constexpr double kRound = 0x1.8p52 + 1023;  // adding it leaves an integer in the low bits

// 2^n, of n + kRound.
PYRL_INLINE double power_of_two(double shifted) {
  std::uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const std::uint64_t power = bits << 52;
  std::memcpy(&shifted, &power, sizeof power);
  return shifted;
}

// x = mantissa 2^exponent, the mantissa in [sqrt(1/2), sqrt(2)).
template <typename Real>
struct Scientific {
  Real mantissa, exponent;
};

inline constexpr std::uint64_t kRootBits = 0x3ff0000000000000 - 0x3fe6a09e667f3bcd;

PYRL_INLINE Scientific<double> scientific(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint64_t biased = (bits + kRootBits) >> 52;
  const std::uint64_t mantissa = bits - ((biased - 1023) << 52);
  // An integer below 2^51 as a double without a conversion, which AVX2 lacks.
  const std::uint64_t shifted = biased + 0x4330000000000000;
  Scientific<double> parts;
  std::memcpy(&parts.mantissa, &mantissa, sizeof mantissa);
  std::memcpy(&parts.exponent, &shifted, sizeof shifted);
  parts.exponent -= 0x1p52 + 1023.0;
  return parts;
}

PYRL_INLINE double larger(double a, double b) { return a < b ? b : a; }
PYRL_INLINE double smaller(double a, double b) { return b < a ? b : a; }

// NaN stays NaN.
template <typename Real>
PYRL_INLINE Real clamped(Real x, double low, double high) {
  return smaller(larger(x, Real(low)), Real(high));
}

template <typename Real>
PYRL_INLINE Real magnitude(Real x) {
  return select(x < 0.0, -x, x);
}

// exp(x) to 1e-13 of it, = scale (1 + rest), with scale a power of two and rest = exp(r) - 1, |r|
// <= ln(2) / 2.
template <typename Real>
struct ExpParts {
  Real scale, rest;
};

template <typename Real>
PYRL_INLINE ExpParts<Real> exp_parts(Real x) {
  const Real near = clamped(x, -708.0, 709.0);
  const Real shifted = fused(near, Real(0x1.71547652b82fep+0), Real(kRound));
  const Real n = shifted - kRound;
  const Real r = fused(n, Real(-0x1.62e42fefa39efp-1), near);  // n ln(2), to 2e-14 where it is most
  // (exp(r) - 1 - r) / r^2 by Chebyshev polynomials, to 4e-13 of it.
  // In pairs, for short chains of operations.
  const Real r2 = r * r, r4 = r2 * r2;
  const Real low = fused(fused(Real(0x1.1111111c47feap-7), r, Real(0x1.55555565c8785p-5)), r2,
                         fused(Real(0x1.5555555553b7bp-3), r, Real(0x1.fffffffffe062p-2)));
  const Real high = fused(fused(Real(0x1.72c72f2e5ee1ep-19), r, Real(0x1.a136c15467d5ap-16)), r2,
                          fused(Real(0x1.a019ada12fcf2p-13), r, Real(0x1.6c166bdcedacdp-10)));
  return {power_of_two(shifted), fused(r2, fused(high, r4, low), r)};
}

// Between 3e-308 (also for smaller results) and 8e307.
template <typename Real>
PYRL_INLINE Real exp_of(Real x) {
  const ExpParts<Real> e = exp_parts(x);
  return fused(e.scale, e.rest, e.scale);
}

template <typename Real>
PYRL_INLINE Real expm1_of(Real x) {
  const ExpParts<Real> e = exp_parts(x);
  return fused(e.scale, e.rest, e.scale - 1.0);
}

// The logarithm of a normal number > 0.
template <typename Real>
PYRL_INLINE Real log_of(Real x) {
  const Scientific<Real> parts = scientific(x);
  const Real f = (parts.mantissa - 1.0) / (parts.mantissa + 1.0);
  const Real g = f * f;
  constexpr double terms[] = {1.0 / 19.0, 1.0 / 17.0, 1.0 / 15.0, 1.0 / 13.0, 1.0 / 11.0,
                              1.0 / 9.0,  1.0 / 7.0,  1.0 / 5.0,  1.0 / 3.0};
  Real sum = 1.0 / 21.0;
  for (const double term : terms) sum = fused(sum, g, Real(term));
  const Real tail = 2.0 * (f * g * sum) + parts.exponent * 0x1.a39ef35793c76p-33;
  return parts.exponent * 0x1.62e42feep-1 + (2.0 * f + tail);
}

}  // namespace pyrl::loss
