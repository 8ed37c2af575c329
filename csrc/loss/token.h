// The part of a policy loss that is local to a token: from its log-probability and columns that
// hold for the whole update to its loss and the gradients with respect to log-probability and
// entropy. With R the ratio, A the advantage and [low, high] the bounds, the surrogate's value V
// and gate G give loss = -A V and d loss / d logprob = -A G; the dual clip caps the loss, a
// detached factor multiplies both, penalties and entropy add to them, and a weight aggregates. The
// same source serves the loop over all tokens, one visit to a row of logits (one token) and CUDA: a
// token's numbers are the same bits, however many are computed together. C++17.
#pragma once

#include "loss/spec.h"

namespace pyrl::loss {

// Real: a double or several (policy_lanes.h). Where the weight is 0: a ratio of 1 and zeros.
template <typename Real>
struct TokenTerm {
  using Flag = decltype(Real(0.0) < Real(0.0));

  Real loss;  // not multiplied by the weight
  Real logprob_grad;
  Real ratio, log_ratio;
  Real penalty;               // value of the first one
  Flag below, above, capped;  // clipped: A < 0, A > 0, and by the dual clip
};

namespace token {

// What is the same for all tokens: a loop over them is compiled for the common surrogates.
struct Kinds {
  SurrogateKind surrogate;
  bool one;    // no ratio
  bool plain;  // one pair of bounds on the ratio, and no column but the advantage
  // Known when the loop runs.
  bool capped;       // dual clip
  bool regularized;  // penalties, entropy or addend
  double low, high;  // bounds of the ratio, without columns
};

PYRL_INLINE bool is(const TokenSpec& spec, BoundsKind kind) { return spec.bounds == kind; }

PYRL_INLINE bool tests_ratio(const TokenSpec& spec) {
  return !spec.trust && spec.bounds < BoundsKind::total_variation;
}

// `has(name)`: there is such a column.
template <typename Columns>
PYRL_INLINE Kinds kinds_of(const TokenSpec& spec, const Columns& in) {
  Kinds kinds;
  kinds.surrogate = spec.surrogate;
  kinds.one = spec.ratio == RatioKind::one;
  kinds.plain = tests_ratio(spec) && spec.widen == 0 && spec.redistribute == 0 &&
                !(spec.pre_clip < kInfinity) && !in.has(TokenColumn::low) &&
                !in.has(TokenColumn::high) && !in.has(TokenColumn::factor);
  kinds.capped = in.has(TokenColumn::dual) || spec.dual < kInfinity;
  kinds.regularized = spec.entropy_coef != 0 || in.has(TokenColumn::addend);
  for (int k = 0; k < kPenalties; ++k)
    kinds.regularized = kinds.regularized || spec.penalty[k] != PenaltyKind::none;
  kinds.low = -kInfinity;
  kinds.high = kInfinity;
  if (is(spec, BoundsKind::radius)) {
    kinds.low = 1.0 - spec.low;
    kinds.high = 1.0 + spec.high;
  } else if (is(spec, BoundsKind::range)) {
    kinds.low = spec.low;
    kinds.high = spec.high;
  }
  return kinds;
}

// The column, or what stands for it.
template <typename Real, typename Columns>
PYRL_INLINE Real column_or(const Columns& in, TokenColumn name, double otherwise) {
  return in.has(name) ? in(name) : Real(otherwise);
}

template <typename Real>
struct Bounds {
  Real low, high;            // of the ratio's value
  Real tested, least, most;  // least <= tested <= most is inside
};

// log(1 - exp(logprob)), at least log(1e-12).
template <typename Real>
PYRL_INLINE Real log_others(Real logprob) {
  return log_of(larger(-expm1_of(logprob), Real(1e-12)));
}

template <typename Real, typename Columns>
PYRL_INLINE void set_limits(const TokenSpec& spec, const Columns& in, Bounds<Real>& bounds) {
  const bool radius = is(spec, BoundsKind::radius);
  if (in.has(TokenColumn::low)) {
    const Real low = in(TokenColumn::low);
    bounds.low = radius ? 1.0 - low : low;
  }
  if (in.has(TokenColumn::high)) {
    const Real high = in(TokenColumn::high);
    bounds.high = radius ? 1.0 + high : high;
  }
  if (spec.widen == 0) return;
  const Real heat = in(TokenColumn::heat);
  bounds.low = 1.0 - (1.0 - bounds.low) * (1.0 - spec.widen * smaller(heat, Real(0.0)));
  bounds.high = 1.0 + (bounds.high - 1.0) * (1.0 + spec.widen * larger(heat, Real(0.0)));
}

// Bounds that test something else than the ratio.
template <typename Real, typename Columns>
PYRL_INLINE void set_trust(const TokenSpec& spec, const Columns& in, Bounds<Real>& bounds) {
  const Real logprob = in(TokenColumn::logprob);
  const Real old = in(spec.trust ? TokenColumn::trust : TokenColumn::anchor);
  if (spec.bounds < BoundsKind::total_variation) {
    bounds.tested = exp_of(clamped(logprob - old, -20.0, 20.0));
    return;
  }
  bounds.least = -spec.high;
  bounds.most = spec.high;
  if (is(spec, BoundsKind::total_variation)) {
    bounds.tested = exp_of(logprob) - exp_of(old);
    return;
  }
  const Real others = -expm1_of(old);
  const Real kl = exp_of(old) * (old - logprob) + others * (log_others(old) - log_others(logprob));
  bounds.tested = select(logprob < old, -kl, kl);
}

// HAPO: heat counts more outside half the bounds, less inside.
template <typename Real, typename Columns>
PYRL_INLINE Real redistributed(const TokenSpec& spec, const Columns& in, Real advantage, Real ratio,
                               const Bounds<Real>& bounds) {
  const Real heat = in(TokenColumn::heat);
  const auto inside = (ratio > 0.5 * (1.0 + bounds.low)) & (ratio < 0.5 * (1.0 + bounds.high));
  const auto counts = (heat > 0.0) ^ inside;
  return advantage * (1.0 + spec.redistribute * select(counts, heat, Real(0.0)));
}

template <typename Real, typename Columns>
PYRL_INLINE TokenTerm<Real> policy_term(const Kinds& kinds, const TokenSpec& spec,
                                        const Columns& in, Real advantage, Real weight) {
  const Real zero = 0.0;
  const Real logprob = in(TokenColumn::logprob);
  TokenTerm<Real> term;
  Real given = zero;
  const auto none = zero < zero;
  auto clamped_ratio = none, moved_far = none;  // without a gradient
  term.log_ratio = zero;
  term.ratio = 1.0;
  if (!kinds.one) {
    given = spec.ratio == RatioKind::token ? logprob - in(TokenColumn::anchor)
                                           : in(TokenColumn::log_ratio);
    given = select(weight != 0.0, given, zero);
    term.log_ratio = clamped(given, spec.log_ratio_low, spec.log_ratio_high);
    term.ratio = exp_of(term.log_ratio);
    // Not of NaN, whose gradient is NaN as its loss is.
    clamped_ratio = (given < spec.log_ratio_low) | (given > spec.log_ratio_high);
  }
  Bounds<Real> bounds;
  bounds.low = kinds.low;
  bounds.high = kinds.high;
  if (!kinds.plain) set_limits(spec, in, bounds);
  bounds.tested = term.ratio;
  bounds.least = bounds.low;
  bounds.most = bounds.high;
  if (!kinds.plain) {
    if (!tests_ratio(spec)) set_trust(spec, in, bounds);
    if (spec.pre_clip < kInfinity) {
      const Real moved = logprob - in(TokenColumn::anchor);
      moved_far = select(advantage < 0.0, -moved, moved) > spec.pre_clip;
    }
    if (spec.redistribute != 0) advantage = redistributed(spec, in, advantage, term.ratio, bounds);
  }
  term.above = (advantage > 0.0) & (bounds.tested > bounds.most);
  term.below = (advantage < 0.0) & (bounds.tested < bounds.least);
  const auto outside = term.above | term.below;
  const Real bounded = smaller(larger(term.ratio, bounds.low), bounds.high);
  Real value = select(outside, bounded, term.ratio);  // V
  Real gate = select(outside, zero, term.ratio);      // G
  if (kinds.surrogate == SurrogateKind::mask_logp) {
    gate = smaller(gate, Real(spec.cap));
    value = gate * logprob;
  } else if (kinds.surrogate == SurrogateKind::clamp_logp) {
    gate = bounded;
    value = gate * logprob;
  } else if (kinds.surrogate == SurrogateKind::gppo) {
    gate = select(clamped_ratio, zero, gate);
    gate = select(term.above, spec.outer_high * value, gate);
    gate = select(term.below, spec.outer_low * value, gate);
    if (spec.outer_value) value = select(outside, gate, value);
  } else {
    if (kinds.surrogate == SurrogateKind::sigmoid) {
      const Real tau = select(advantage > 0.0, Real(spec.tau_positive), Real(spec.tau_other));
      const Real s = 1.0 / (1.0 + exp_of(tau * (1.0 - value)));
      value = (4.0 / tau) * s;
      gate = gate * (4.0 * (s * (1.0 - s)));
    }
    gate = select(clamped_ratio, zero, gate);
  }
  if (!kinds.plain) gate = select(moved_far, zero, gate);
  const Real pull = -advantage;
  term.loss = pull * value;
  term.logprob_grad = pull * gate;
  term.capped = none;
  if (kinds.capped) {
    const Real most = pull * column_or<Real>(in, TokenColumn::dual, spec.dual);
    term.capped = (advantage < 0.0) & (term.loss > most);
    term.loss = select(term.capped, most, term.loss);
    term.logprob_grad = select(term.capped, zero, term.logprob_grad);
  }
  if (!kinds.plain && in.has(TokenColumn::factor)) {
    const Real factor = in(TokenColumn::factor);
    const auto counts = factor != 0.0;
    term.loss = select(counts, factor * term.loss, zero);
    term.logprob_grad = select(counts, factor * term.logprob_grad, zero);
  }
  return term;
}

template <typename Real, typename Columns>
PYRL_INLINE void regularize(const TokenSpec& spec, const Columns& in, TokenTerm<Real>& term) {
  for (int k = 0; k < kPenalties; ++k) {
    const PenaltyKind kind = spec.penalty[k];
    if (kind == PenaltyKind::none) continue;
    const auto target = static_cast<TokenColumn>(static_cast<int>(TokenColumn::target_0) + k);
    const auto scale = static_cast<TokenColumn>(static_cast<int>(TokenColumn::scale_0) + k);
    const Real scales = column_or<Real>(in, scale, 1.0);
    Divergence<Real> of =
        divergence(kind, spec.leak, in(TokenColumn::logprob) - in(target), scales);
    if (in.has(scale)) of = scaled(of, scales);
    if (k == 0) term.penalty = of.value;
    const double coef = spec.penalty_coef[k];
    if (coef == 0) continue;
    term.loss = term.loss + coef * of.value;
    term.logprob_grad = term.logprob_grad + coef * of.slope;
  }
  if (spec.entropy_coef != 0) term.loss = term.loss - spec.entropy_coef * in(TokenColumn::entropy);
  if (in.has(TokenColumn::addend)) term.loss = term.loss + in(TokenColumn::addend);
}

}  // namespace token

template <typename Real>
PYRL_INLINE Real entropy_grad(const TokenSpec& spec, Real weight) {
  return select(weight != 0.0, -weight * spec.entropy_coef, Real(0.0));
}

// `in(name)`: the column, of as many tokens as Real holds; so are advantage and weight.
template <typename Real, typename Columns>
PYRL_INLINE TokenTerm<Real> token_term(const token::Kinds& kinds, const TokenSpec& spec,
                                       const Columns& in, Real advantage, Real weight) {
  TokenTerm<Real> term = token::policy_term(kinds, spec, in, advantage, weight);
  if (kinds.regularized) token::regularize(spec, in, term);
  const auto used = weight != 0.0;
  term.loss = select(used, term.loss, Real(0.0));
  term.logprob_grad = select(used, weight * term.logprob_grad, Real(0.0));
  return term;
}

struct TokenLoss {
  double loss, logprob_grad, entropy_grad;
};

namespace token {

// Token t of the columns, with the log-probability and entropy of this moment.
struct OneToken {
  const TokenColumns& columns;
  std::int64_t t;
  double logprob, entropy;

  PYRL_HD bool has(TokenColumn name) const {
    return static_cast<bool>(columns.column[static_cast<int>(name)]);
  }
  PYRL_HD double operator()(TokenColumn name) const {
    if (name == TokenColumn::logprob) return logprob;
    if (name == TokenColumn::entropy) return entropy;
    return columns.column[static_cast<int>(name)][static_cast<std::size_t>(t)];
  }
};

}  // namespace token

PYRL_HD static inline TokenLoss token_loss(const TokenSpec& spec, const TokenColumns& columns,
                                           std::int64_t t, double logprob, double entropy) {
  const token::OneToken in{columns, t, logprob, entropy};
  const double weight = in(TokenColumn::weight);
  const TokenTerm<double> term =
      token_term(token::kinds_of(spec, in), spec, in, in(TokenColumn::advantage), weight);
  return {term.loss, term.logprob_grad, entropy_grad(spec, weight)};
}

}  // namespace pyrl::loss
