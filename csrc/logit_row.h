// One row of logits in one sweep: blocks that fit the L1 cache, each with its own maximum, merged
// in double. Shifted base-2 sums: t = (z - max) * log2(e) / temperature is computed from the
// difference, which is exact, so a common offset of the logits costs no accuracy.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>

#include "logit_matrix.h"

namespace pyrl {

inline constexpr int kBlock = 2048;  // elements: with its work space it stays in the L1 cache

// Scale of base-2 exponents; throws std::invalid_argument for a temperature that is not positive.
double exponent_scale(double temperature);

// ---- block kernels, n <= kBlock elements (logit_row.cpp) ----

// The largest element; NaN if one is NaN or +inf.
float block_max(const float* z, int n);
double block_max(const double* z, int n);

// sum of 2^t and of t 2^t for t = (z - maximum) * scale.
struct BlockSums {
  double sum;
  double moment;
};
BlockSums block_sums(const float* z, int n, float maximum, float scale);
BlockSums block_sums(const double* z, int n, double maximum, double scale);

// weight = 2^t; elements below 2^-126 are 0.
void block_weights(const float* z, float* weight, int n, float maximum, float scale);
void block_weights(const double* z, double* weight, int n, double maximum, double scale);

// dz = 2^t (constant + slope t) for t = (z - shift - rest) * scale; dz may be z.
template <typename Real>
struct GradientRow {
  Real shift, rest, scale, constant, slope;
};
void block_gradient(const float* z, float* dz, int n, const GradientRow<float>& row);
void block_gradient(const double* z, double* dz, int n, const GradientRow<double>& row);

// Keeps top[0] >= ... >= top[4], the largest elements seen.
void block_top(const float* z, int n, float* top);
void block_top(const double* z, int n, double* top);

// The block as float; float and double blocks are read in place.
inline const float* widen(const float* z, int, float*) { return z; }
inline const double* widen(const double* z, int, double*) { return z; }
const float* widen(const Float16* z, int n, float* buffer);
const float* widen(const BFloat16* z, int n, float* buffer);

// Where a block of results is computed, and its rounding (to nearest even) into the row; float and
// double results are computed in the row itself.
inline float* wide(float* out, float*) { return out; }
inline double* wide(double* out, double*) { return out; }
inline float* wide(Float16*, float* buffer) { return buffer; }
inline float* wide(BFloat16*, float* buffer) { return buffer; }
inline void narrow(const float*, int, float*) {}
inline void narrow(const double*, int, double*) {}
void narrow(const float* value, int n, Float16* out);
void narrow(const float* value, int n, BFloat16* out);

// ---- rows ----

template <typename Element>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <typename Element>
using Real = typename RealOf<Element>::type;

inline float widen_one(float z) { return z; }
inline double widen_one(double z) { return z; }
inline float widen_one(Float16 z) {
  float value;
  widen(&z, 1, &value);
  return value;
}
inline float widen_one(BFloat16 z) {
  float value;
  widen(&z, 1, &value);
  return value;
}

inline constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// sum = sum_j 2^t_j and moment = sum_j t_j 2^t_j for t_j = (z_j - maximum) * scale.
struct RowSums {
  double maximum = kMinusInfinity;
  double sum = 0;
  double moment = 0;

  // Moves both parts to the larger maximum; also valid when one of them is empty.
  void merge(const RowSums& part, double scale) {
    if (part.sum == 0) return;
    const double top = std::max(maximum, part.maximum);
    const auto [own, own_moment] = shifted(top, scale);
    const auto [other, other_moment] = part.shifted(top, scale);
    *this = {top, own + other, own_moment + other_moment};
  }

  BlockSums shifted(double top, double scale) const {
    if (sum == 0) return {0, 0};
    const double distance = (maximum - top) * scale;
    const double factor = std::exp2(distance);
    return {sum * factor, factor == 0 ? 0 : (moment + sum * distance) * factor};
  }

  // nats, at the temperature that scale stands for
  double entropy() const {
    return sum == 0 ? 0 : std::max(0.0, (std::log2(sum) - moment / sum) * std::numbers::ln2);
  }
  double logsumexp(double temperature) const { return maximum / temperature + std::log(sum); }
  double logprob(double z, double temperature) const {
    return sum == 0 ? kMinusInfinity : (z - maximum) / temperature - std::log(sum);
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
  using R = Real<Element>;
  RowSummary<Element> result;
  result.top.fill(-std::numeric_limits<R>::infinity());
  alignas(64) R buffer[kBlock];
  for (std::int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int n = static_cast<int>(std::min<std::int64_t>(kBlock, vocabulary - begin));
    const R* z = widen(row + begin, n, buffer);
    const R maximum = block_max(z, n);
    if (std::isnan(maximum)) result.valid = false;
    if (!result.valid) return result;
    RowSums part;
    if (maximum > -std::numeric_limits<R>::infinity()) {
      const BlockSums sums = block_sums(z, n, maximum, static_cast<R>(scale));
      part = {static_cast<double>(maximum), sums.sum, sums.moment};
    }
    if (maximum > result.top.back()) block_top(z, n, result.top.data());
    result.sums.merge(part, scale);
    if (blocks != nullptr) blocks[begin / kBlock] = part;
  }
  return result;
}

}  // namespace pyrl
