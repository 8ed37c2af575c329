// Penalties on the distance of a log-probability from a target, for a block of tokens. C++17.
#pragma once

#include "policy_math.h"

namespace pyrl {

// Of D = logprob - target.
enum class Penalty : int {
  none,
  k1,       // D
  abs,      // |D|
  k2,       // D^2 / 2
  k3,       // exp(-D) + D - 1; D within [-20, 20], value within [-10, 10], no gradient outside
  k1_plus,  // value of k1, gradient of k2
  k3_plus,  // value of k3, gradient of k2
  leaky,    // x = scale D: x if x > 0, else leak x
};

namespace token {

template <int kMax>
struct Terms {
  double value[kMax], slope[kMax];
};

template <int kMax>
PYRL_HD static inline void divergence(Penalty kind, double leak, const double* logprob,
                                      const double* target, const double* scale, int n,
                                      Terms<kMax>& terms) {
  double* value = terms.value;
  double* slope = terms.slope;
  for (int i = 0; i < n; ++i) {
    const double d = logprob[i] - target[i];
    value[i] = d;
    slope[i] = kind == Penalty::k1_plus ? d : 1.0;
  }
  if (kind == Penalty::abs) {
    for (int i = 0; i < n; ++i) {
      slope[i] = value[i] > 0 ? 1.0 : (value[i] < 0 ? -1.0 : 0.0);
      value[i] = magnitude(value[i]);
    }
  } else if (kind == Penalty::k2) {
    for (int i = 0; i < n; ++i) {
      slope[i] = value[i];
      value[i] = value[i] * value[i] * 0.5;
    }
  } else if (kind == Penalty::k3 || kind == Penalty::k3_plus) {
    for (int i = 0; i < n; ++i) {
      const double d = value[i], near = clamped(d, -20.0, 20.0);
      const double grown = expm1_of(-near);
      const double raw = grown + near;
      const double bent = near == d ? (raw > 10.0 ? 0.0 : -grown) : 0.0;
      value[i] = smaller(raw, 10.0);
      slope[i] = kind == Penalty::k3 ? bent : d;
    }
  } else if (kind == Penalty::leaky) {
    for (int i = 0; i < n; ++i) {
      const double side = scale ? scale[i] : 1.0;
      slope[i] = side * value[i] > 0 ? 1.0 : leak;
      value[i] *= slope[i];
    }
  }
  // A select, not a product: the divergence of a token that is left out may be infinite.
  if (!scale) return;
  for (int i = 0; i < n; ++i) {
    value[i] = scale[i] != 0 ? scale[i] * value[i] : 0.0;
    slope[i] = scale[i] != 0 ? scale[i] * slope[i] : 0.0;
  }
}

}  // namespace token
}  // namespace pyrl
