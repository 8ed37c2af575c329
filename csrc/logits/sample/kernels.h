// The kernels of sampling on one block of a row, in a table per instruction set. Every table gives
// the same bits: 16 lanes (float64: 8) in a fixed order, and no fused multiply-add, which some
// processors lack. So a draw is the same on every machine; only float64 logits, whose exponential
// is the C library's, may differ in the last bit.
#pragma once

#include <cstdint>

#include "base/isa.h"

namespace pyrl::logits::sample {

inline constexpr int kSampleBlock = 2048;     // elements: 8 KiB of float32 stay in the L1 cache
inline constexpr int kSampleTop = 5;          // confidence = mass of this many most probable tokens
inline constexpr int kLowestExponent = -127;  // weights of 2^t with t below it are exactly 0
inline constexpr int kSpare = 16;             // elements beyond its end that `between` may write

// sum of 2^t and of t 2^t for t = (z - maximum) * scale; a NaN in z makes the moment NaN.
struct SampleSums {
  double sum;
  double moment;
};

// The tokens with z >= floor.
template <typename R>
struct Above {
  double mass = 0;    // sum of their weights
  double moment = 0;  // of t 2^t, if it is asked for
  std::int64_t count = 0;
  R least = static_cast<R>(__builtin_inf());   // the smallest of them
  R below = -static_cast<R>(__builtin_inf());  // the largest of the others
};

// n <= kSampleBlock, except for `above`, `above_moment` and `between`.
template <typename R>
struct SampleKernels {
  static constexpr Isa kWidest = Isa::avx512;
  static const SampleKernels& scalar();
  static const SampleKernels& avx2();
  static const SampleKernels& avx512();

  R (*maximum)(const R* z, int n);  // NaN is overlooked
  // Meanwhile the bytes from `ahead` on, as many as it reads of z, come nearer in the caches.
  SampleSums (*sums)(const R* z, int n, R maximum, R scale, const char* ahead);
  void (*top)(const R* z, int n, R* top);  // keeps top[0] >= ... >= top[4], the largest seen
  void (*weights)(const R* z, R* weight, int n, R maximum, R scale);  // 2^t
  Above<R> (*above)(const R* z, const R* weight, int n, R floor);
  Above<R> (*above_moment)(const R* z, const R* weight, int n, R floor, R maximum, R scale);
  // Copies the tokens with low <= z <= high, in order; returns their number. Outputs may be inputs.
  int (*between)(const R* z, const R* weight, int n, R low, R high, R* z_out, R* weight_out);
  double (*mass)(const R* z, const R* weight, int n, R floor);  // of the tokens with z >= floor
  // The first i at which the sum of weight[0..i] exceeds `target`; if rounding leaves none, the
  // last i with any weight.
  int (*find)(const R* weight, int n, double target);
};

template <typename R>
PYRL_INLINE const SampleKernels<R>& sample_kernels() {
  return chosen<SampleKernels<R>>();
}

}  // namespace pyrl::logits::sample
