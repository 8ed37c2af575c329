// The nucleus of a row without a sort: bisection on the logit of its least probable token.
#pragma once

#include <bit>
#include <numeric>
#include <vector>

#include "logits/row.h"

namespace pyrl::logits::stats {

struct Nucleus {
  double threshold;  // the logit at and above which a token is inside; +inf: none is
  double log_mass;   // nats
  double entropy;    // of the renormalised nucleus, nats
};

// Integers in the order of the numbers.
inline std::int32_t order_of(float x) {
  const std::int32_t bits = std::bit_cast<std::int32_t>(x);
  return bits < 0 ? static_cast<std::int32_t>(0x80000000u - static_cast<std::uint32_t>(bits))
                  : bits;
}
inline std::int64_t order_of(double x) {
  const std::int64_t bits = std::bit_cast<std::int64_t>(x);
  return bits < 0 ? static_cast<std::int64_t>((std::uint64_t{1} << 63) -
                                              static_cast<std::uint64_t>(bits))
                  : bits;
}
inline float number_of(std::int32_t order) {
  return std::bit_cast<float>(
      order < 0 ? static_cast<std::int32_t>(0x80000000u - static_cast<std::uint32_t>(order))
                : order);
}
inline double number_of(std::int64_t order) {
  return std::bit_cast<double>(
      order < 0
          ? static_cast<std::int64_t>((std::uint64_t{1} << 63) - static_cast<std::uint64_t>(order))
          : order);
}

// Sum and moment of those of z that are at least `threshold`.
template <typename R>
BlockSums mass_above(const std::vector<R>& z, Exponent exponent, double threshold) {
  BlockSums total{0, 0, kMinusInfinity};
  for (std::size_t begin = 0; begin < z.size(); begin += kBlock) {
    const int n = static_cast<int>(std::min<std::size_t>(kBlock, z.size() - begin));
    const BlockSums part = row_kernels<R>().sums_above(z.data() + begin, n, exponent, threshold);
    total.sum += part.sum;
    total.moment += part.moment;
  }
  return total;
}

// `sums` of the whole row, which has one token with mass at least; `z` is work space.
template <typename Row, typename R>
Nucleus find_nucleus(const Row& row, const PartSums& sums, const double* maximum_of_block,
                     double scale, double share, bool crossing, std::vector<R>& z) {
  const Exponent exponent{scale, sums.shift};
  const double target = share * sums.sum;
  // Few tokens hold most of the mass: look down from the largest until enough of it is seen.
  double floor = kMinusInfinity;
  bool enough = false;
  for (const double depth : {8.0, 16.0, 32.0, 1100.0}) {
    floor = sums.maximum - depth / scale;
    z.clear();
    each_block(row, 0, row.vocabulary, maximum_of_block, floor, [&](const auto* block, int n) {
      for (int i = 0; i < n; ++i) {
        const R value = widen_one(block[i]);
        if (static_cast<double>(value) >= floor) z.push_back(value);
      }
    });
    enough = share < 1 && mass_above(z, exponent, floor).sum >= target;
    if (enough || share == 1) break;
  }
  if (!enough) return {kMinusInfinity, 0, sums.entropy()};  // rounding included
  auto low = order_of(static_cast<R>(floor)), high = order_of(static_cast<R>(sums.maximum));
  while (low < high) {
    const auto middle = std::midpoint(high, low);  // rounds towards high
    if (mass_above(z, exponent, static_cast<double>(number_of(middle))).sum >= target) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  double threshold = static_cast<double>(number_of(low));  // the crossing token's logit
  if (!crossing) {
    double next = -kMinusInfinity;
    for (const R value : z) {
      if (static_cast<double>(value) > threshold) next = std::min(next, static_cast<double>(value));
    }
    threshold = next;
  }
  const BlockSums inside = mass_above(z, exponent, threshold);
  if (inside.sum == 0) return {threshold, kMinusInfinity, 0};
  const double entropy = (std::log2(inside.sum) - inside.moment / inside.sum) * std::numbers::ln2;
  return {threshold, std::log(inside.sum / sums.sum), std::max(0.0, entropy)};
}

}  // namespace pyrl::logits::stats
