// One row as the sampler reads it: its sums, those of each block, and its five largest logits.
#pragma once

#include "logit_row.h"

namespace pyrl {

inline constexpr int kTop = 5;  // confidence = mass of this many most probable tokens

template <typename R>
void block_weights(const R* z, R* weight, int n, double maximum, double scale) {
  const RowKernels<R>& kernels = row_kernels<R>();
  const double own = kernels.representable(scale);
  kernels.weights(z, weight, n, {own, kernels.representable(maximum * own)});
}

// sum = sum_j 2^t_j and moment = sum_j t_j 2^t_j for t_j = (z_j - maximum) * scale.
struct RowSums {
  double maximum = kMinusInfinity;
  double sum = 0;
  double moment = 0;

  // Moves both parts to the larger maximum; also valid when one of them is empty.
  void merge(const RowSums& part, double scale) {
    if (part.sum == 0) return;
    const double top = std::max(maximum, part.maximum);
    const RowSums own = shifted(top, scale), other = part.shifted(top, scale);
    *this = {top, own.sum + other.sum, own.moment + other.moment};
  }

  RowSums shifted(double top, double scale) const {
    if (sum == 0) return {top, 0, 0};
    const double distance = (maximum - top) * scale;
    const double factor = std::exp2(distance);
    return {top, sum * factor, factor == 0 ? 0 : (moment + sum * distance) * factor};
  }

  // nats, at the temperature that scale stands for
  double entropy() const {
    return sum == 0 ? 0 : std::max(0.0, (std::log2(sum) - moment / sum) * std::numbers::ln2);
  }
  double logprob(double z, double temperature) const {
    return sum == 0 ? kMinusInfinity : std::min(0.0, (z - maximum) / temperature - std::log(sum));
  }
};

template <typename Element>
struct RowSummary {
  RowSums sums;
  std::array<Real<Element>, kTop> top;  // descending, -inf beyond the vocabulary
  bool valid = true;                    // false: a NaN or +inf is in the row

  // mass of the five most probable tokens
  double confidence(double scale) const {
    if (sums.sum == 0) return 0;
    double mass = 0;
    for (const Real<Element> z : top) mass += std::exp2((z - sums.maximum) * scale);
    return std::min(1.0, mass / sums.sum);
  }
};

// One sweep. If `blocks` is given it receives the sums of each block of kBlock tokens.
template <typename Element>
RowSummary<Element> summarize(const Element* row, std::int64_t vocabulary, double scale,
                              RowSums* blocks = nullptr) {
  const RowKernels<Element>& kernels = row_kernels<Element>();
  const double own = kernels.representable(scale);
  RowSummary<Element> result;
  result.top.fill(-std::numeric_limits<Real<Element>>::infinity());
  for (std::int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int n = static_cast<int>(std::min<std::int64_t>(kBlock, vocabulary - begin));
    const double maximum = kernels.maximum(row + begin, n);
    if (std::isnan(maximum)) result.valid = false;
    if (!result.valid) return result;
    RowSums part;
    if (maximum > kMinusInfinity) {
      const double shift = kernels.representable(maximum * own);
      const BlockSums sums = kernels.sums(row + begin, n, {own, shift});
      part = RowSums{shift / own, sums.sum, sums.moment}.shifted(maximum, own);
    }
    if (maximum > result.top.back()) kernels.top(row + begin, n, result.top.data(), kTop);
    result.sums.merge(part, scale);
    if (blocks != nullptr) blocks[begin / kBlock] = part;
  }
  return result;
}

}  // namespace pyrl
