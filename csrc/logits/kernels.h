// The kernels on one block of a row, in a table per element type and instruction set (base/isa.h).
// Sampling has tables of its own beside it, of kernels that give the same bits on every set.
#pragma once

#include "base/isa.h"
#include "logits/element.h"

namespace pyrl::logits {

inline constexpr int kBlock = 2048;  // elements: with its work space it stays in the L1 cache
inline constexpr int kMostTop = 8;   // confidence is the mass of at most this many tokens

// t = z * scale - shift, rounded once: both numbers are `representable`, and what the rounding of
// shift leaves is known to the caller. A masked token (z = -inf) weighs exactly 0.
struct Exponent {
  double scale;
  double shift;
};

struct BlockSums {
  double sum;      // of 2^t; NaN if an element is NaN or +inf
  double moment;   // of t 2^t
  double maximum;  // of z, if asked for; NaN is overlooked
};

struct BlockExtras {
  double sum_p2;        // of 4^t
  double moment_p2;     // of t 4^t
  double second;        // of 2^(t second_ratio)
  double exponent_sum;  // of t; -inf if a token is masked
};

// dz = 2^t (constant + slope t) + offset; where z >= threshold with the inside coefficients.
struct GradientRow {
  Exponent exponent;
  double constant, slope, offset;
  double threshold, inside_constant, inside_slope;  // threshold NaN: no nucleus
  bool masked;                                      // the row may have masked tokens
};

// The widest instruction set that has a table of its own.
template <typename Element>
inline constexpr Isa kWidestOf = Isa::avx512;
template <>
inline constexpr Isa kWidestOf<BFloat16> = Isa::avx512_bf16;
template <>
inline constexpr Isa kWidestOf<double> = Isa::scalar;

// n <= kBlock elements.
template <typename Element>
struct RowKernels {
  using R = Real<Element>;
  static constexpr Isa kWidest = kWidestOf<Element>;
  static const RowKernels& scalar();
  static const RowKernels& avx2();
  static const RowKernels& avx512();
  static const RowKernels& avx512_bf16();

  double (*representable)(double number);
  double (*maximum)(const Element* z, int n);  // NaN if one is NaN or +inf
  // Without `masked`, which costs an operation, the moment of a block with masked tokens is NaN.
  BlockSums (*sums)(const Element* z, int n, Exponent exponent, bool masked, bool maximum);
  BlockSums (*sums_above)(const Element* z, int n, Exponent exponent, double threshold);
  BlockExtras (*extras)(const Element* z, int n, Exponent exponent, double second_ratio);
  void (*top)(const Element* z, int n, R* top, int count);  // top[0] >= ... of those seen
  void (*weights)(const Element* z, R* weight, int n, Exponent exponent);
  void (*gradient)(const Element* z, Element* dz, int n, const GradientRow& row);  // dz may be z
  void (*widen)(const Element* z, int n, R* out);
  void (*narrow)(const R* value, int n, Element* out);       // to nearest even
  void (*cap)(const Element* z, int n, double cap, R* out);  // cap tanh(z / cap)
  void (*uncap)(const R* capped, R* dz, int n, double cap);  // dz *= 1 - (capped / cap)^2
};

template <typename Element>
PYRL_INLINE const RowKernels<Element>& row_kernels() {
  return chosen<RowKernels<Element>>();
}

}  // namespace pyrl::logits
