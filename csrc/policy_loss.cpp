#include "policy_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"

namespace pyrl {
namespace {

constexpr double kLogRatioLimit = 20;
constexpr double kKlLimit = 10;

// A value and its derivative with respect to the log-probability.
struct Term {
  double value;
  double slope;
};

struct Token {
  double logprob, old_logprob, advantage, low, high;
};

struct Surrogate {
  Term loss;
  double ratio, kl_old;
  bool clipped_low, clipped_high, clipped_dual;
};

Surrogate surrogate(const Token& token, double dual_clip) {
  const double difference = token.logprob - token.old_logprob;
  const double log_ratio = std::clamp(difference, -kLogRatioLimit, kLogRatioLimit);
  const double ratio = std::exp(log_ratio);
  const double plain = -token.advantage * ratio;
  const double bounded = -token.advantage * std::clamp(ratio, 1 - token.low, 1 + token.high);
  const bool clipped = plain < bounded;
  const double cap = -token.advantage * dual_clip;
  const bool dual = token.advantage < 0 && std::max(plain, bounded) > cap;
  Surrogate result;
  result.loss.value = dual ? cap : clipped ? bounded : plain;
  result.loss.slope = dual || clipped || std::abs(difference) > kLogRatioLimit ? 0 : plain;
  result.ratio = ratio;
  result.kl_old = std::expm1(log_ratio) - log_ratio;
  result.clipped_low = clipped && token.advantage < 0;
  result.clipped_high = clipped && token.advantage > 0;
  result.clipped_dual = dual;
  return result;
}

Term kl_divergence(KlEstimator estimator, double difference) {
  if (estimator == KlEstimator::k1) return {difference, 1};
  if (estimator == KlEstimator::k2) return {difference * difference / 2, difference};
  const double clamped = std::clamp(difference, -kLogRatioLimit, kLogRatioLimit);
  const double value = std::expm1(-clamped) + clamped;
  if (value > kKlLimit) return {kKlLimit, 0};
  return {value, std::abs(difference) > kLogRatioLimit ? 0 : -std::expm1(-clamped)};
}

void check_token(const Token& token, double weight, std::size_t t) {
  PYRL_CHECK(weight > 0 && std::isfinite(weight), "weight_T: expected finite numbers >= 0, got ",
             weight, " at ", t);
  PYRL_CHECK(std::isfinite(token.advantage), "advantage_T: expected finite numbers, got ",
             token.advantage, " at ", t);
  PYRL_CHECK(token.low >= 0 && token.high >= 0,
             "clip_low_T, clip_high_T: expected radii >= 0, got ", token.low, " and ", token.high,
             " at ", t);
}

template <typename Real>
void check_lengths(const PolicyLossArgs<Real>& args) {
  const std::size_t tokens = args.logprob_T.size();
  for (const std::span<const Real>& values :
       {args.entropy_T, args.old_logprob_T, args.advantage_T, args.weight_T, args.clip_low_T,
        args.clip_high_T, args.ref_logprob_T.empty() ? args.logprob_T : args.ref_logprob_T}) {
    PYRL_CHECK(values.size() == tokens, "policy_loss: expected ", tokens,
               " entries in each array, got ", values.size());
  }
}

void check_spec(const PolicyLossSpec& spec, bool has_reference) {
  PYRL_CHECK(spec.dual_clip > 1, "dual_clip: expected > 1, got ", spec.dual_clip);
  PYRL_CHECK(spec.kl_coef == 0 || has_reference,
             "ref_logprob_T: expected log-probabilities for kl_coef = ", spec.kl_coef,
             ", got none");
}

}  // namespace

template <typename Real>
PolicyLossTotals policy_loss(const PolicyLossArgs<Real>& args) {
  const PolicyLossSpec& spec = args.spec;
  const bool has_reference = !args.ref_logprob_T.empty() || args.logprob_T.empty();
  check_spec(spec, has_reference);
  check_lengths(args);
  PolicyLossTotals totals;
  for (std::size_t t = 0; t < args.logprob_T.size(); ++t) {
    args.loss_T[t] = args.logprob_grad_T[t] = args.entropy_grad_T[t] = 0;
    const double weight = args.weight_T[t];
    if (weight == 0) continue;
    const Token token{args.logprob_T[t], args.old_logprob_T[t], args.advantage_T[t],
                      args.clip_low_T[t], args.clip_high_T[t]};
    check_token(token, weight, t);
    const Surrogate policy = surrogate(token, spec.dual_clip);
    Term loss = policy.loss;
    if (has_reference) {
      const Term kl =
          kl_divergence(spec.kl, token.logprob - static_cast<double>(args.ref_logprob_T[t]));
      totals.kl_ref += weight * kl.value;
      if (spec.kl_coef != 0) {
        loss.value += spec.kl_coef * kl.value;
        loss.slope += spec.kl_coef * kl.slope;
      }
    }
    if (spec.entropy_coef != 0) loss.value -= spec.entropy_coef * args.entropy_T[t];
    args.loss_T[t] = static_cast<Real>(loss.value);
    args.logprob_grad_T[t] = static_cast<Real>(weight * loss.slope);
    args.entropy_grad_T[t] = static_cast<Real>(-weight * spec.entropy_coef);
    totals.loss += weight * loss.value;
    totals.weight += weight;
    totals.clipped_low += policy.clipped_low ? weight : 0;
    totals.clipped_high += policy.clipped_high ? weight : 0;
    totals.clipped_dual += policy.clipped_dual ? weight : 0;
    totals.kl_old += weight * policy.kl_old;
    totals.ratio += weight * policy.ratio;
    totals.ratio_max = std::max(totals.ratio_max, policy.ratio);
  }
  return totals;
}

template PolicyLossTotals policy_loss(const PolicyLossArgs<float>&);
template PolicyLossTotals policy_loss(const PolicyLossArgs<double>&);

}  // namespace pyrl
