#include <cmath>

#include "logits/stats/body.h"

namespace pyrl::logits::stats {
namespace {

// One double: the reference of the other instruction sets, and float64 logits on all of them.
struct Plain {
  using Vector = double;
  using Mask = bool;
  using Scalar = double;
  static constexpr int kWidth = 1;
  static constexpr double kSmallest = -1e300;
  static constexpr bool kClamps = false;

  static double all(double x) { return x; }
  static double head(double v, int) { return v; }

  template <typename Element>
  static double load(const Element* z) {
    return static_cast<double>(widen_one(*z));
  }
  template <typename Element>
  static double load(const Element* z, int) {
    return load(z);
  }
  template <typename Element>
  static void store(double v, Element* out) {
    narrow_one(static_cast<Real<Element>>(v), out);
  }
  template <typename Element>
  static void store(double v, Element* out, int) {
    store(v, out);
  }

  static double add(double x, double y) { return x + y; }
  static double mul(double x, double y) { return x * y; }
  static double max(double x, double y) { return x > y ? x : y; }
  static double fma(double x, double y, double z) { return x * y + z; }
  static double fms(double x, double y, double z) { return x * y - z; }

  static bool at_least(double x, double y) { return !(x < y); }
  static bool above(double x, double y) { return x > y; }
  static bool both(bool x, bool y) { return x && y; }
  static bool any(bool mask) { return mask; }
  static double choose(bool mask, double x, double y) { return mask ? x : y; }

  static double exp2(double t) { return std::exp2(t); }
  static double exp2(bool mask, double t) { return mask ? std::exp2(t) : 0; }
  static double tanh(double x) { return std::tanh(x); }
  static double mul_where(bool mask, double x, double y) { return mask ? x * y : 0; }
  static double fma_where(bool mask, double x, double y, double z) { return mask ? x * y + z : z; }

  static double total(double v) { return v; }
  static double largest(double v) { return v; }
};

}  // namespace
}  // namespace pyrl::logits::stats

namespace pyrl::logits {

template <typename Element>
const RowKernels<Element>& RowKernels<Element>::scalar() {
  static constexpr RowKernels table = stats::RowBody<stats::Plain, Element>::table();
  return table;
}

template const RowKernels<float>& RowKernels<float>::scalar();
template const RowKernels<double>& RowKernels<double>::scalar();
template const RowKernels<Float16>& RowKernels<Float16>::scalar();
template const RowKernels<BFloat16>& RowKernels<BFloat16>::scalar();

}  // namespace pyrl::logits
