// The gradient of a row's statistics with respect to its logits. With t_j = log p_j, q_j the
// probabilities renormalised over the nucleus and H_N their entropy:
//   du_j = p_j (g_logsumexp + g_self - g_logprob - g_entropy (t_j + entropy))
//          + g_logprob 1[j = label] - g_self / V - g_nucleus q_j (log q_j + H_N) 1[j in nucleus]
//   dz_j = du_j (1 - tanh^2(z_j / softcap)) / temperature
#pragma once

#include "logits/device_sums.cuh"
#include "logits/stats/token_stats.h"

namespace pyrl::logits::stats::device {

using namespace logits::device;

// What a row's gradient is made of; NaN where a number is missing is never read.
struct RowUpstream {
  double entropy, logsumexp;
  double nucleus_entropy, nucleus_threshold, nucleus_log_mass;
  double grad_logprob, grad_entropy, grad_logsumexp, grad_self_certainty, grad_nucleus;

  // Else the row has no part in what is differentiated, whatever it holds.
  __device__ bool asks() const {
    return grad_logprob != 0 || grad_entropy != 0 || grad_logsumexp != 0 ||
           grad_self_certainty != 0 || grad_nucleus != 0;
  }
};

// dz_j = slope of the soft cap * (2^e (constant + factor e) + everywhere), e = (z_j - shift) scale,
// with further terms inside the nucleus, and the label's element on its own.
template <typename R>
struct RowGradient {
  R near, rest;  // shift = near + rest, in two parts of the logits' type
  R scale;
  R constant, factor, everywhere;
  R nucleus_constant, nucleus_factor;
  double threshold;  // infinity: no nucleus
  double temperature;
  double vocabulary;
  Softcap softcap;
  RowUpstream row;

  __device__ RowGradient(const RowUpstream& row, const TokenStatsOptions& options,
                         std::int64_t vocabulary)
      : temperature(options.temperature),
        vocabulary(static_cast<double>(vocabulary)),
        softcap{options.softcap},
        row(row) {
    const double shift = row.logsumexp * temperature;
    near = static_cast<R>(shift);
    rest = static_cast<R>(shift - static_cast<double>(near));
    scale = static_cast<R>(kLog2E / temperature);
    constant = static_cast<R>((row.grad_logsumexp + row.grad_self_certainty - row.grad_logprob -
                               row.grad_entropy * row.entropy) /
                              temperature);
    factor = static_cast<R>(-row.grad_entropy * kLn2 / temperature);
    everywhere = static_cast<R>(-row.grad_self_certainty / this->vocabulary / temperature);
    const bool nucleus = row.grad_nucleus != 0;
    const double per_mass = nucleus ? -row.grad_nucleus * exp(-row.nucleus_log_mass) : 0;
    threshold = nucleus ? row.nucleus_threshold : INFINITY;
    nucleus_constant = static_cast<R>(
        nucleus ? per_mass * (row.nucleus_entropy - row.nucleus_log_mass) / temperature : 0);
    nucleus_factor = static_cast<R>(per_mass * kLn2 / temperature);
  }

  __device__ R of(R raw) const {
    const R z = softcap.of(raw);
    const R exponent = larger(((z - near) - rest) * scale, kLeastExponent<R>);
    R sum = constant + factor * exponent;
    if (static_cast<double>(z) >= threshold) sum += nucleus_constant + nucleus_factor * exponent;
    return softcap.slope(z) * (base2(exponent) * sum + everywhere);
  }

  // In float64: 1 - p cancels when p is near 1, expm1 does not.
  __device__ double of_label(double raw) const {
    const double z = softcap.of(raw);
    const double logprob = z / temperature - row.logsumexp;
    const double p = exp(logprob);
    double sum = (row.grad_logsumexp + row.grad_self_certainty) * p -
                 row.grad_logprob * expm1(logprob) - row.grad_self_certainty / vocabulary;
    if (p != 0) sum -= row.grad_entropy * p * (logprob + row.entropy);
    if (p != 0 && static_cast<double>(static_cast<R>(z)) >= threshold) {
      const double log_q = logprob - row.nucleus_log_mass;
      sum -= row.grad_nucleus * exp(log_q) * (log_q + row.nucleus_entropy);
    }
    return softcap.slope(z) * sum / temperature;
  }
};

// Whether a column is in the thread's group that starts at column `first`.
template <typename Element>
__device__ bool in_group(std::int64_t column, std::int64_t first) {
  const std::int64_t after = column - first;
  return after >= 0 && after < kUnroll * kStride<Element> &&
         after % kStride<Element> < kVector<Element>;
}

// Writes columns begin <= column < end of the row's gradient; `out` may be `row`: a column is
// written by the thread that reads it.
template <typename Element>
__device__ void write_gradient(const Element* row, std::int64_t begin, std::int64_t end, int thread,
                               std::int64_t label,
                               const RowGradient<typename DeviceReal<Element>::type>& gradient,
                               Element* out) {
  using R = typename DeviceReal<Element>::type;
  const bool vectors = aligned(out + begin);
  sweep(row, begin, end, thread, [&](R(&z)[kGroup<Element>], std::int64_t first) {
    const bool holds_label = in_group<Element>(label, first);
    const double z_label = holds_label ? static_cast<double>(widen_device(row[label])) : 0;
#pragma unroll
    for (int i = 0; i < kGroup<Element>; ++i) z[i] = gradient.of(z[i]);
    store_group(z, first, end, vectors, out);
    if (holds_label) round_to(static_cast<R>(gradient.of_label(z_label)), out[label]);
  });
}

template <typename Element>
__device__ void fill_gradient(double value, std::int64_t begin, std::int64_t end, int thread,
                              Element* out) {
  Element element;
  round_to(static_cast<typename DeviceReal<Element>::type>(value), element);
  for (std::int64_t v = begin + thread; v < end; v += kThreads) out[v] = element;
}

}  // namespace pyrl::logits::stats::device
