// One row of logits in one sweep over blocks that fit the L1 cache. Sums are shifted and in base 2:
// t = z * scale - shift is rounded once, so a common offset of the logits costs no accuracy. The
// shift is the largest of the part's first logits; it moves when a block lies far above.
// A row is always summed in the same parts, whether one thread has them all or several share them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <span>

#include "logits/kernels.h"

namespace pyrl::logits {

inline constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// NaN stays NaN.
inline double at_least_0(double x) { return x < 0 ? 0 : x; }
inline double at_most_0(double x) { return x > 0 ? 0 : x; }

inline constexpr std::int64_t kPart = 8 * kBlock;  // columns that are summed on their own

// Scale of base-2 exponents; throws std::invalid_argument for a temperature that is not positive.
double exponent_scale(double temperature);

// The block as its arithmetic type; float and double blocks are read in place.
inline const float* widen(const float* z, int, float*) { return z; }
inline const double* widen(const double* z, int, double*) { return z; }
template <typename Half>
const float* widen(const Half* z, int n, float* space) {
  row_kernels<Half>().widen(z, n, space);
  return space;
}

inline std::int64_t blocks_of(std::int64_t vocabulary) {
  return (vocabulary + kBlock - 1) / kBlock;
}
inline std::int64_t parts_of(std::int64_t vocabulary) { return (vocabulary + kPart - 1) / kPart; }

// A row as blocks of `Block`, the type that its kernels read; gradients are written as Element.
template <typename E>
struct PlainRow {
  using Element = E;
  using Block = E;
  const Element* z;
  std::int64_t vocabulary;

  const Block* block(std::int64_t begin, int, Block*) const { return z + begin; }
  double logit(std::int64_t v) const { return static_cast<double>(widen_one(z[v])); }
  void gradient(std::int64_t begin, int n, const GradientRow& row, Element* dz) const {
    row_kernels<Element>().gradient(z + begin, dz + begin, n, row);
  }
  double slope(double) const { return 1; }
};

// With softcap: cap tanh(z / cap), computed block by block in a work space.
template <typename E>
struct CappedRow {
  using Element = E;
  using Block = Real<E>;
  const Element* z;
  std::int64_t vocabulary;
  double cap;

  const Block* block(std::int64_t begin, int n, Block* space) const {
    row_kernels<Element>().cap(z + begin, n, cap, space);
    return space;
  }
  double logit(std::int64_t v) const {
    Block value;
    return static_cast<double>(*block(v, 1, &value));
  }
  void gradient(std::int64_t begin, int n, const GradientRow& row, Element* dz) const {
    alignas(64) Block capped[kBlock], wide[kBlock];
    row_kernels<Block>().gradient(block(begin, n, capped), wide, n, row);
    row_kernels<Block>().uncap(capped, wide, n, cap);
    row_kernels<Element>().narrow(wide, n, dz + begin);
  }
  double slope(double capped) const {
    return std::isinf(capped) ? 0 : 1 - (capped / cap) * (capped / cap);
  }
};

// Calls visit(z, n, begin) for each block of columns [begin, end), until one returns false.
template <typename Row, typename Visit>
void each_block(const Row& row, std::int64_t begin, std::int64_t end, Visit&& visit) {
  alignas(64) typename Row::Block space[kBlock];
  for (; begin < end; begin += kBlock) {
    const int n = static_cast<int>(std::min<std::int64_t>(kBlock, end - begin));
    if (!visit(row.block(begin, n, space), n, begin)) return;
  }
}

// Calls visit(z, n) for the blocks whose largest logit is not below `floor`.
template <typename Row, typename Visit>
void each_block(const Row& row, std::int64_t begin, std::int64_t end,
                const double* maximum_of_block, const double& floor, Visit&& visit) {
  for (; begin < end; begin += kBlock) {
    if (maximum_of_block[begin / kBlock] < floor) continue;
    each_block(row, begin, std::min(end, begin + kBlock), [&](const auto* z, int n, std::int64_t) {
      visit(z, n);
      return true;
    });
  }
}

// sum = sum_j 2^t_j and moment = sum_j t_j 2^t_j; sum_p2, moment_p2, second and exponent_sum as in
// BlockExtras. Empty: shift = -inf.
struct PartSums {
  double shift = kMinusInfinity;
  double sum = 0, moment = 0;
  double maximum = kMinusInfinity;  // of z, if those of the blocks are asked for
  double sum_p2 = 0, moment_p2 = 0, second = 0, exponent_sum = 0;
  std::int64_t columns = 0;  // that are in exponent_sum
  bool valid = true;         // false: a NaN or +inf is in the row
  bool masked = false;       // false: no token is masked

  bool empty() const { return shift == kMinusInfinity; }

  // The same sums for t = z * scale - target.
  void move_to(double target, double second_ratio) {
    if (empty() || target == shift) {
      shift = target;
      return;
    }
    const double distance = shift - target;
    const double factor = std::exp2(distance);
    moment = (moment + sum * distance) * factor;
    sum *= factor;
    moment_p2 = (moment_p2 + sum_p2 * distance) * factor * factor;
    sum_p2 *= factor * factor;
    second *= std::exp2(distance * second_ratio);
    exponent_sum += distance * static_cast<double>(columns);
    shift = target;
  }

  void merge(PartSums part, double second_ratio) {
    valid = valid && part.valid;
    masked = masked || part.masked;
    if (part.empty()) {
      exponent_sum += part.exponent_sum;  // 0, or -inf for masked tokens
      return;
    }
    const double target = std::max(shift, part.shift);
    move_to(target, second_ratio);
    part.move_to(target, second_ratio);
    sum += part.sum;
    moment += part.moment;
    maximum = std::max(maximum, part.maximum);
    sum_p2 += part.sum_p2;
    moment_p2 += part.moment_p2;
    second += part.second;
    exponent_sum += part.exponent_sum;
    columns += part.columns;
  }

  // nats, at the temperature that the scale stands for
  double entropy() const {
    return empty() ? 0 : at_least_0((std::log2(sum) - moment / sum) * std::numbers::ln2);
  }
};

// A block whose sum is larger than it could be with no logit much above the shift is summed again
// with a larger shift. A single logit may exceed the shift by 13, which costs no accuracy.
inline constexpr double kLargestSum = 4.0 * kBlock;

inline constexpr int kFirst = 256;  // logits whose largest is near enough to shift their part by

// What a logit above the shift grows to at a lower second temperature, before its block is summed
// again.
inline constexpr double kLargestSecond = 0x1p40;

struct SumOptions {
  double scale;         // exponent_scale(temperature)
  bool extras;          // also the sums of BlockExtras
  double second_ratio;  // temperature / second temperature
};

// One sweep over the columns [begin, end), at most kPart of them from a multiple of kPart. If
// maximum_of_block is given it receives the largest logit of each block of the row.
template <typename Row>
PartSums sum_part(const Row& row, std::int64_t begin, std::int64_t end, const SumOptions& options,
                  double* maximum_of_block = nullptr) {
  const RowKernels<typename Row::Block>& kernels = row_kernels<typename Row::Block>();
  const double scale = kernels.representable(options.scale);
  PartSums result;
  each_block(row, begin, end, [&](const auto* z, int n, std::int64_t at) {
    const auto shift_to = [&](double maximum) {
      result.move_to(kernels.representable(maximum * scale), options.second_ratio);
    };
    constexpr bool wide = sizeof(typename Row::Block) == sizeof(double);
    constexpr double far = wide ? kFarthestOfFloat64 : kFarthest;
    const auto masks = [&](double z) { return z * scale <= -far; };
    const auto breaks = [&](double z) { return !(z * scale < far); };  // NaN too
    double maximum = kNaN;
    if (result.empty()) {
      maximum = kernels.maximum(z, std::min(n, kFirst));
      if (!std::isfinite(maximum) || masks(maximum)) maximum = kernels.maximum(z, n);
      if (breaks(maximum)) return result.valid = false;
      if (masks(maximum)) {
        if (maximum_of_block != nullptr) maximum_of_block[at / kBlock] = maximum;
        result.masked = true;
        result.exponent_sum = kMinusInfinity;
        return true;
      }
      shift_to(maximum);
    }
    const bool largest = maximum_of_block != nullptr;
    result.masked = result.masked || largest;  // these sums do not tell
    BlockSums sums = kernels.sums(z, n, {scale, result.shift}, result.masked, largest);
    if (std::isnan(sums.moment)) {
      result.masked = true;
      sums = kernels.sums(z, n, {scale, result.shift}, true, largest);
    }
    if (!(sums.sum <= kLargestSum)) {
      maximum = kernels.maximum(z, n);
      if (breaks(maximum)) return result.valid = false;
      shift_to(maximum);
      sums = kernels.sums(z, n, {scale, result.shift}, result.masked, largest);
    }
    result.sum += sums.sum;
    result.moment += sums.moment;
    if (largest) {
      result.maximum = std::max(result.maximum, sums.maximum);
      maximum_of_block[at / kBlock] = sums.maximum;
    }
    if (options.extras) {
      const auto extras_of_block = [&] {
        return kernels.extras(z, n, {scale, result.shift}, options.second_ratio);
      };
      BlockExtras extras = extras_of_block();
      if (!(extras.second <= kLargestSecond)) {
        shift_to(kernels.maximum(z, n));
        extras = extras_of_block();
      }
      result.sum_p2 += extras.sum_p2;
      result.moment_p2 += extras.moment_p2;
      result.second += extras.second;
      result.exponent_sum += extras.exponent_sum;
      result.columns += n;
    }
    return true;
  });
  return result;
}

}  // namespace pyrl::logits
