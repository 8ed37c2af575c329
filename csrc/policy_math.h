// exp, expm1 and log in double from additions, multiplications and selects alone, so that a loop
// over tokens vectorises and every instruction set, and every number of tokens, gives the same
// bits. Internal linkage: each file may be compiled for another instruction set. C++17, also nvcc.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#ifndef PYRL_HD
#ifdef __CUDACC__
#define PYRL_HD __host__ __device__
#else
#define PYRL_HD
#endif
#endif

// Into the loop over tokens, which vectorises only without a call.
#ifdef __CUDACC__
#define PYRL_INLINE static __forceinline__ __host__ __device__
#else
#define PYRL_INLINE static inline __attribute__((always_inline))
#endif

namespace pyrl {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// NaN stays NaN.
PYRL_INLINE double clamped(double x, double low, double high) {
  const double above = x < low ? low : x;
  return above > high ? high : above;
}

PYRL_INLINE double larger(double a, double b) { return a < b ? b : a; }
PYRL_INLINE double smaller(double a, double b) { return b < a ? b : a; }
PYRL_INLINE double magnitude(double x) { return x < 0 ? -x : x; }

// exp(x) to 1e-13 of it, = scale (1 + rest), with scale a power of two and rest = exp(r) - 1, |r|
// <= ln(2) / 2.
struct ExpParts {
  double scale, rest;
};

PYRL_INLINE ExpParts exp_parts(double x) {
  constexpr double kRound = 0x1.8p52;  // adding it leaves an integer in the low bits
  const double near = clamped(x, -708.0, 709.0);
  const double shifted = near * 0x1.71547652b82fep+0 + kRound;
  const double n = shifted - kRound;
  const double r = near - n * 0x1.62e42fefa39efp-1;  // rounded to 6e-14, where |x| is largest
  std::int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const std::int64_t power = (bits + 1023) << 52;
  ExpParts parts;
  std::memcpy(&parts.scale, &power, sizeof power);
  // (exp(r) - 1 - r) / r^2 by Chebyshev polynomials, to 4e-13 of it.
  // In pairs, for short chains of operations.
  const double r2 = r * r, r4 = r2 * r2;
  const double low = (0x1.fffffffffe062p-2 + 0x1.5555555553b7bp-3 * r) +
                     (0x1.55555565c8785p-5 + 0x1.1111111c47feap-7 * r) * r2;
  const double high = (0x1.6c166bdcedacdp-10 + 0x1.a019ada12fcf2p-13 * r) +
                      (0x1.a136c15467d5ap-16 + 0x1.72c72f2e5ee1ep-19 * r) * r2;
  parts.rest = r + r2 * (low + high * r4);
  return parts;
}

// Between 3e-308 (also for smaller results) and 8e307.
PYRL_INLINE double exp_of(double x) {
  const ExpParts e = exp_parts(x);
  return e.scale + e.scale * e.rest;
}

PYRL_INLINE double expm1_of(double x) {
  const ExpParts e = exp_parts(x);
  return (e.scale - 1.0) + e.scale * e.rest;
}

// Of a normal number > 0.
PYRL_INLINE double log_of(double x) {
  std::int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // The exponent such that the mantissa lies in [sqrt(1/2), sqrt(2)).
  const std::int64_t raised = bits + (0x3ff0000000000000 - 0x3fe6a09e667f3bcd);
  const std::int64_t biased = static_cast<std::int64_t>(static_cast<std::uint64_t>(raised) >> 52);
  const std::int64_t mantissa = bits - ((biased - 1023) << 52);
  double m;
  std::memcpy(&m, &mantissa, sizeof m);
  // An integer below 2^51 as a double without a conversion, which AVX2 lacks.
  const std::int64_t shifted_bits = biased + 0x4330000000000000;
  double shifted;
  std::memcpy(&shifted, &shifted_bits, sizeof shifted);
  const double exponent = shifted - (0x1p52 + 1023.0);
  const double f = (m - 1.0) / (m + 1.0);
  const double g = f * f;
  double sum = 1.0 / 21.0;
  sum = sum * g + 1.0 / 19.0;
  sum = sum * g + 1.0 / 17.0;
  sum = sum * g + 1.0 / 15.0;
  sum = sum * g + 1.0 / 13.0;
  sum = sum * g + 1.0 / 11.0;
  sum = sum * g + 1.0 / 9.0;
  sum = sum * g + 1.0 / 7.0;
  sum = sum * g + 1.0 / 5.0;
  sum = sum * g + 1.0 / 3.0;
  const double tail = 2.0 * (f * g * sum) + exponent * 0x1.a39ef35793c76p-33;
  return exponent * 0x1.62e42feep-1 + (2.0 * f + tail);
}

}  // namespace pyrl
