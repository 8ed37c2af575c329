// The bodies of the row kernels, over a type of lanes that each instruction set defines (in an
// unnamed namespace, so that what is instantiated from them stays in its file). Lanes has
//   Vector, Mask, Scalar (of one lane), kWidth; kSmallest, the exponent below which a weight is 0,
//   and kClamps, whether exp2 needs a mask for that: if not, only a weight of -inf does, which is 0
//   or NaN without one;
//   all(x), load(z), load(z, n), store(v, out), store(v, out, n): memory of any element type; what
//   a short load leaves is -inf; head(v, n): 0 beyond the first n lanes;
//   add, mul, fma, fms (x y - z), max (y where one of x, y is NaN), tanh;
//   at_least(x, y): not x < y, so true for NaN; above(x, y): x > y; both, any (masks);
//   exp2(t); exp2(mask, t), mul_where(mask, x, y): 0 outside the mask; fma_where(mask, x, y, z): z
//   outside;
//   choose(mask, x, y); total(v), largest(v): over the lanes, in double.
#pragma once

#include "logits/kernels.h"

namespace pyrl::logits::stats {

template <typename Lanes, typename Element>
struct RowBody {
  using V = typename Lanes::Vector;
  using M = typename Lanes::Mask;
  using R = Real<Element>;

  static constexpr double kInfinity = __builtin_inf();
  static constexpr int kWidth = Lanes::kWidth;
  static constexpr int kUnroll = 4;  // independent sums hide the latency of an addition

  static PYRL_INLINE V all(double number) {
    return Lanes::all(static_cast<typename Lanes::Scalar>(number));
  }

  struct Whole {
    static constexpr bool kTail = false;
  };
  struct Tail {
    static constexpr bool kTail = true;
  };

  // Calls visit(lanes, position, count, which of the kUnroll sums, Whole or Tail).
  template <typename In, typename Visit>
  static PYRL_INLINE void sweep(const In* z, int n, Visit&& visit) {
    int i = 0;
    for (; i + kUnroll * kWidth <= n; i += kUnroll * kWidth) {
#pragma GCC unroll 4
      for (int k = 0; k < kUnroll; ++k) {
        visit(Lanes::load(z + i + k * kWidth), i + k * kWidth, kWidth, k, Whole{});
      }
    }
    for (; i + kWidth <= n; i += kWidth) visit(Lanes::load(z + i), i, kWidth, 0, Whole{});
    if (i < n) visit(Lanes::load(z + i, n - i), i, n - i, 0, Tail{});
  }

  template <typename Out>
  static PYRL_INLINE void put(V v, Out* out, int count) {
    if (count == kWidth) {
      Lanes::store(v, out);
    } else {
      Lanes::store(v, out, count);
    }
  }

  struct Sums {
    V part[kUnroll];
    PYRL_INLINE explicit Sums(double start) {
      for (int k = 0; k < kUnroll; ++k) part[k] = all(start);
    }
    PYRL_INLINE V& operator[](int k) { return part[k]; }
    PYRL_INLINE double total() const {
      return Lanes::total(Lanes::add(Lanes::add(part[0], part[1]), Lanes::add(part[2], part[3])));
    }
    PYRL_INLINE double largest() const {
      return Lanes::largest(Lanes::max(Lanes::max(part[0], part[1]), Lanes::max(part[2], part[3])));
    }
  };

  static double representable(double number) {
    return static_cast<double>(static_cast<typename Lanes::Scalar>(number));
  }

  static double maximum(const Element* z, int n) {
    Sums largest(-kInfinity), broken(0);
    const V zero = all(0), least = all(-1);
    sweep(z, n, [&](V v, int, int, int k, auto) __attribute__((always_inline)) {
      largest[k] = Lanes::max(v, largest[k]);
      broken[k] = Lanes::fma(zero, Lanes::max(least, v), broken[k]);  // 0 times inf or NaN is NaN
    });
    return broken.total() == 0 ? largest.largest() : __builtin_nan("");
  }

  // Masks keep 0 times -inf out of the moment; NaN passes them.
  template <bool kMasked, bool kMaximum>
  static PYRL_INLINE BlockSums sums_sweep(const Element* z, int n, Exponent exponent) {
    Sums sum(0), moment(0), largest(-kInfinity);
    const V scale = all(exponent.scale), shift = all(exponent.shift), least = all(Lanes::kSmallest);
    sweep(z, n, [&](V v, int, int, int k, auto part) __attribute__((always_inline)) {
      const V t = Lanes::fms(v, scale, shift);
      if constexpr (kMaximum) largest[k] = Lanes::max(v, largest[k]);
      if constexpr (kMasked || Lanes::kClamps || decltype(part)::kTail) {
        const M kept = Lanes::at_least(t, least);
        const V weight = Lanes::exp2(kept, t);
        sum[k] = Lanes::add(sum[k], weight);
        moment[k] = Lanes::fma_where(kept, weight, t, moment[k]);
      } else {
        const V weight = Lanes::exp2(t);
        sum[k] = Lanes::add(sum[k], weight);
        moment[k] = Lanes::fma(weight, t, moment[k]);
      }
    });
    return {sum.total(), moment.total(), largest.largest()};
  }

  static BlockSums sums(const Element* z, int n, Exponent exponent, bool masked, bool maximum) {
    if (maximum) return sums_sweep<true, true>(z, n, exponent);
    return masked ? sums_sweep<true, false>(z, n, exponent)
                  : sums_sweep<false, false>(z, n, exponent);
  }

  static BlockSums sums_above(const Element* z, int n, Exponent exponent, double threshold) {
    Sums sum(0), moment(0), largest(-kInfinity);
    const V scale = all(exponent.scale), shift = all(exponent.shift), least = all(Lanes::kSmallest);
    const V smallest = all(threshold);
    sweep(z, n, [&](V v, int, int, int k, auto) __attribute__((always_inline)) {
      const V t = Lanes::fms(v, scale, shift);
      const M kept = Lanes::both(Lanes::at_least(t, least), Lanes::at_least(v, smallest));
      const V weight = Lanes::exp2(kept, t);
      largest[k] = Lanes::max(v, largest[k]);
      sum[k] = Lanes::add(sum[k], weight);
      moment[k] = Lanes::fma_where(kept, weight, t, moment[k]);
    });
    return {sum.total(), moment.total(), largest.largest()};
  }

  static BlockExtras extras(const Element* z, int n, Exponent exponent, double second_ratio) {
    Sums sum(0), moment(0), second(0), exponents(0);
    const V scale = all(exponent.scale), shift = all(exponent.shift), least = all(Lanes::kSmallest);
    const V least_half = all(Lanes::kSmallest / 2), ratio = all(second_ratio);
    sweep(z, n, [&](V v, int, int count, int k, auto) __attribute__((always_inline)) {
      const V t = Lanes::fms(v, scale, shift);
      const M kept = Lanes::at_least(t, least_half);  // so that the square is no subnormal
      const V weight = Lanes::exp2(kept, t);
      const V square = Lanes::mul(weight, weight);
      sum[k] = Lanes::add(sum[k], square);
      moment[k] = Lanes::fma_where(kept, square, t, moment[k]);
      const V t_second = Lanes::mul(t, ratio);
      second[k] = Lanes::add(second[k], Lanes::exp2(Lanes::at_least(t_second, least), t_second));
      exponents[k] = Lanes::add(exponents[k], count == kWidth ? t : Lanes::head(t, count));
    });
    return {sum.total(), moment.total(), second.total(), exponents.total()};
  }

  static void top(const Element* z, int n, R* top, int count) {
    int i = 0;
    for (; i + kUnroll * kWidth <= n; i += kUnroll * kWidth) {
      V largest = Lanes::load(z + i);
      for (int k = 1; k < kUnroll; ++k)
        largest = Lanes::max(Lanes::load(z + i + k * kWidth), largest);
      const V least = Lanes::all(static_cast<typename Lanes::Scalar>(top[count - 1]));
      if (!Lanes::any(Lanes::above(largest, least))) continue;
      for (int j = i; j < i + kUnroll * kWidth; ++j) insert(widen_one(z[j]), top, count);
    }
    for (; i < n; ++i) insert(widen_one(z[i]), top, count);
  }

  static PYRL_INLINE void insert(R value, R* top, int count) {
    if (!(value > top[count - 1])) return;
    int place = count - 1;
    for (; place > 0 && top[place - 1] < value; --place) top[place] = top[place - 1];
    top[place] = value;
  }

  static void weights(const Element* z, R* weight, int n, Exponent exponent) {
    const V scale = all(exponent.scale), shift = all(exponent.shift), least = all(Lanes::kSmallest);
    sweep(z, n, [&](V v, int i, int count, int, auto) __attribute__((always_inline)) {
      const V t = Lanes::fms(v, scale, shift);
      put(Lanes::exp2(Lanes::at_least(t, least), t), weight + i, count);
    });
  }

  template <bool kMasked, bool kSlope, bool kNucleus, bool kOffset>
  static PYRL_INLINE void gradient_sweep(const Element* z, Element* dz, int n,
                                         const GradientRow& row) {
    const V scale = all(row.exponent.scale), shift = all(row.exponent.shift);
    const V least = all(Lanes::kSmallest), constant = all(row.constant), slope = all(row.slope);
    const V threshold = all(row.threshold), inside_constant = all(row.inside_constant);
    const V inside_slope = all(row.inside_slope), offset = all(row.offset);
    sweep(z, n, [&](V v, int i, int count, int, auto part) __attribute__((always_inline)) {
      const V t = Lanes::fms(v, scale, shift);
      V factor = kSlope ? Lanes::fma(slope, t, constant) : constant;
      if constexpr (kNucleus) {
        const V inside = Lanes::fma(inside_slope, t, inside_constant);
        factor = Lanes::choose(Lanes::at_least(v, threshold), inside, factor);
      }
      V result;
      if constexpr (kMasked || Lanes::kClamps || decltype(part)::kTail) {
        const M kept = Lanes::at_least(t, least);
        result = Lanes::mul_where(kept, Lanes::exp2(kept, t), factor);
      } else {
        result = Lanes::mul(Lanes::exp2(t), factor);
      }
      if constexpr (kOffset) result = Lanes::add(result, offset);
      put(result, dz + i, count);
    });
  }

  // The tail is masked in any case: sums_sweep does not tell of tokens that are masked there.
  static void gradient(const Element* z, Element* dz, int n, const GradientRow& row) {
    const bool nucleus = row.threshold == row.threshold;
    if (nucleus && row.offset != 0) return gradient_sweep<true, true, true, true>(z, dz, n, row);
    if (nucleus) return gradient_sweep<true, true, true, false>(z, dz, n, row);
    if (row.offset != 0) return gradient_sweep<true, true, false, true>(z, dz, n, row);
    if (row.masked) return gradient_sweep<true, true, false, false>(z, dz, n, row);
    if (row.slope == 0) return gradient_sweep<false, false, false, false>(z, dz, n, row);
    gradient_sweep<false, true, false, false>(z, dz, n, row);
  }

  static void widen(const Element* z, int n, R* out) {
    sweep(z, n, [&](V v, int i, int count, int, auto) __attribute__((always_inline)) {
      put(v, out + i, count);
    });
  }

  static void narrow(const R* value, int n, Element* out) {
    sweep(value, n, [&](V v, int i, int count, int, auto) __attribute__((always_inline)) {
      put(v, out + i, count);
    });
  }

  // Infinities stay: a masked token is still masked, a broken row still broken.
  static void cap(const Element* z, int n, double cap, R* out) {
    const V inverse = all(1 / cap), limit = all(cap), lowest = all(-kInfinity);
    sweep(z, n, [&](V v, int i, int count, int, auto) __attribute__((always_inline)) {
      const V capped = Lanes::mul(limit, Lanes::tanh(Lanes::mul(v, inverse)));
      const M finite = Lanes::both(Lanes::above(v, lowest), Lanes::above(all(kInfinity), v));
      put(Lanes::choose(finite, capped, v), out + i, count);
    });
  }

  // A masked token's gradient is 0 already.
  static void uncap(const R* capped, R* dz, int n, double cap) {
    const V inverse = all(1 / cap), minus_one = all(-1), lowest = all(-kInfinity);
    int i = 0;
    const auto visit = [&](V v, V slope, int count) __attribute__((always_inline)) {
      const V share = Lanes::mul(v, inverse);
      const V factor = Lanes::fms(share, share, all(1));
      put(Lanes::mul_where(Lanes::above(v, lowest), Lanes::mul(minus_one, factor), slope), dz + i,
          count);
    };
    for (; i + kWidth <= n; i += kWidth)
      visit(Lanes::load(capped + i), Lanes::load(dz + i), kWidth);
    if (i < n) visit(Lanes::load(capped + i, n - i), Lanes::load(dz + i, n - i), n - i);
  }

  static constexpr RowKernels<Element> table() {
    return {representable, maximum,  sums,  sums_above, extras, top,
            weights,       gradient, widen, narrow,     cap,    uncap};
  }
};

// ---- for lanes of float ----

// 2^r for r in [0, 1): minimax polynomial of degree 5, relative error 8.3e-8 before rounding, with
// 2^0 = 1 exactly.
template <typename Lanes>
PYRL_INLINE typename Lanes::Vector exp2_fraction(typename Lanes::Vector r) {
  typename Lanes::Vector p = Lanes::all(1.8671302e-3f);
  p = Lanes::fma(p, r, Lanes::all(9.0170300e-3f));
  p = Lanes::fma(p, r, Lanes::all(5.5799913e-2f));
  p = Lanes::fma(p, r, Lanes::all(2.4016445e-1f));
  p = Lanes::fma(p, r, Lanes::all(6.9315131e-1f));
  return Lanes::fma(p, r, Lanes::all(1.0f));
}

// Minimax near 0, where (1 - e^-2x) / (1 + e^-2x) cancels; also needs magnitude(v), divide(x, y)
// and with_sign(magnitude, sign).
template <typename Lanes>
PYRL_INLINE typename Lanes::Vector tanh_lanes(typename Lanes::Vector x) {
  using V = typename Lanes::Vector;
  const V size = Lanes::magnitude(x), square = Lanes::mul(x, x), one = Lanes::all(1);
  V p = Lanes::all(-5.7049829e-3f);
  p = Lanes::fma(p, square, Lanes::all(2.0639084e-2f));
  p = Lanes::fma(p, square, Lanes::all(-5.3739714e-2f));
  p = Lanes::fma(p, square, Lanes::all(1.3331442e-1f));
  p = Lanes::fma(p, square, Lanes::all(-3.3333282e-1f));
  const V near_zero = Lanes::fma(Lanes::mul(p, square), x, x);
  const V t = Lanes::mul(size, Lanes::all(-2.8853901f));
  const V power = Lanes::exp2(Lanes::at_least(t, Lanes::all(Lanes::kSmallest)), t);
  const V far = Lanes::divide(Lanes::fms(one, one, power), Lanes::add(one, power));
  return Lanes::choose(Lanes::above(Lanes::all(0.625f), size), near_zero, Lanes::with_sign(far, x));
}

}  // namespace pyrl::logits::stats
