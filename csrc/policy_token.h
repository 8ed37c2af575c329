// The part of a policy loss that is local to a token: from its log-probability and columns that
// hold for the whole update to its loss and the gradients with respect to log-probability and
// entropy. With R the ratio, A the advantage and [low, high] the bounds, the surrogate's value V
// and gate G give loss = -A V and d loss / d logprob = -A G; the dual clip caps the loss, a
// detached factor multiplies both, penalties and entropy add to them, and a weight aggregates. The
// same source serves the loop over all tokens, one visit to a row of logits (one token) and CUDA: a
// token's numbers are the same bits, however many are computed together. C++17.
#pragma once

#include "policy_spec.h"

namespace pyrl {

// Of up to kMax tokens. Where the weight is 0: a ratio of 1 and zeros.
template <int kMax>
struct TokenLosses {
  double loss[kMax];  // not multiplied by the weight
  double logprob_grad[kMax];
  double ratio[kMax], log_ratio[kMax];
  double clipped_low[kMax], clipped_high[kMax], clipped_dual[kMax];  // the weight, or 0
  double penalty[kMax];                                              // value of the first one
};

namespace token {

// What is the same for all tokens: a loop over them is compiled for each.
struct Kinds {
  SurrogateKind surrogate;
  bool one;    // no ratio
  bool plain;  // one pair of bounds on the ratio, and no column but the advantage
};

PYRL_HD static inline bool tests_ratio(const TokenSpec& spec) {
  return spec.trust == 0 && spec.bounds < static_cast<double>(BoundsKind::total_variation);
}

PYRL_HD static inline Kinds kinds_of(const TokenSpec& spec, const TokenColumns& in) {
  const bool plain = tests_ratio(spec) && spec.widen == 0 && spec.redistribute == 0 &&
                     !(spec.pre_clip < kInfinity) && !column(in, TokenColumn::low) &&
                     !column(in, TokenColumn::high) && !column(in, TokenColumn::dual) &&
                     !column(in, TokenColumn::factor);
  return {static_cast<SurrogateKind>(static_cast<int>(spec.surrogate)),
          spec.ratio == static_cast<double>(RatioKind::one), plain};
}

// Columns of losses that are not plain.
template <int kMax>
struct Work {
  double tested[kMax];  // least <= tested <= most is inside; 0 where the ratio is
  double least[kMax], most[kMax];
  double low[kMax], high[kMax];  // of the ratio's value
  double away[kMax];             // how far log R moved to where A pulls it
  double heat[kMax], dual[kMax], factor[kMax];
};

// Bounds of the ratio: base + sign low and base + high.
struct Interval {
  double base, sign, low, high;
  double ratio;  // 1: they test the ratio itself, 0: Work::tested
};

PYRL_HD static inline Interval interval_of(const TokenSpec& spec) {
  const double ratio = tests_ratio(spec) ? 1 : 0;
  if (spec.bounds == static_cast<double>(BoundsKind::radius))
    return {1, -1, spec.low, spec.high, ratio};
  if (spec.bounds == static_cast<double>(BoundsKind::range))
    return {0, 1, spec.low, spec.high, ratio};
  return {0, 1, -kInfinity, kInfinity, ratio};
}

template <int kMax>
PYRL_HD static inline void log_ratio(const TokenSpec& spec, const TokenColumns& in, int n,
                                     TokenLosses<kMax>& out) {
  const double* weight = column(in, TokenColumn::weight);
  const double* logprob = column(in, TokenColumn::logprob);
  const double* anchor = column(in, TokenColumn::anchor);
  const double* given = column(in, TokenColumn::log_ratio);
  if (spec.ratio == static_cast<double>(RatioKind::one)) {
    for (int i = 0; i < n; ++i) out.log_ratio[i] = 0;
  } else if (spec.ratio == static_cast<double>(RatioKind::token)) {
    for (int i = 0; i < n; ++i) out.log_ratio[i] = weight[i] != 0 ? logprob[i] - anchor[i] : 0.0;
  } else {
    for (int i = 0; i < n; ++i) out.log_ratio[i] = weight[i] != 0 ? given[i] : 0.0;
  }
}

// log(1 - exp(logprob)), at least log(1e-12).
PYRL_INLINE double log_others(double logprob) { return log_of(larger(-expm1_of(logprob), 1e-12)); }

template <int kMax>
PYRL_INLINE void neutral_columns(const TokenSpec& spec, const TokenColumns& in, int n,
                                 Work<kMax>& work) {
  const double* heat = column(in, TokenColumn::heat);
  const double* dual = column(in, TokenColumn::dual);
  const double* factor = column(in, TokenColumn::factor);
  for (int i = 0; i < n; ++i) work.heat[i] = heat ? heat[i] : 0.0;
  for (int i = 0; i < n; ++i) work.dual[i] = dual ? dual[i] : spec.dual;
  for (int i = 0; i < n; ++i) work.factor[i] = factor ? factor[i] : 1.0;
  for (int i = 0; i < n; ++i) work.away[i] = work.tested[i] = 0.0;
  if (!(spec.pre_clip < kInfinity)) return;
  const double* logprob = column(in, TokenColumn::logprob);
  const double* anchor = column(in, TokenColumn::anchor);
  const double* advantage = column(in, TokenColumn::advantage);
  for (int i = 0; i < n; ++i) {
    const double moved = logprob[i] - anchor[i];
    work.away[i] = advantage[i] < 0 ? -moved : moved;
  }
}

template <int kMax>
PYRL_INLINE void bounds(const TokenSpec& spec, const TokenColumns& in, int n, Work<kMax>& work) {
  const double* logprob = column(in, TokenColumn::logprob);
  const double* old =
      spec.trust != 0 ? column(in, TokenColumn::trust) : column(in, TokenColumn::anchor);
  const double* low = column(in, TokenColumn::low);
  const double* high = column(in, TokenColumn::high);
  const Interval all = interval_of(spec);
  for (int i = 0; i < n; ++i) work.low[i] = all.base + all.sign * (low ? low[i] : all.low);
  for (int i = 0; i < n; ++i) work.high[i] = all.base + (high ? high[i] : all.high);
  if (spec.widen != 0) {
    const double* heat = column(in, TokenColumn::heat);
    for (int i = 0; i < n; ++i) {
      work.low[i] = 1.0 - (1.0 - work.low[i]) * (1.0 - spec.widen * smaller(heat[i], 0.0));
      work.high[i] = 1.0 + (work.high[i] - 1.0) * (1.0 + spec.widen * larger(heat[i], 0.0));
    }
  }
  for (int i = 0; i < n; ++i) {
    work.least[i] = work.low[i];
    work.most[i] = work.high[i];
  }
  if (spec.bounds == static_cast<double>(BoundsKind::total_variation)) {
    for (int i = 0; i < n; ++i) work.tested[i] = exp_of(logprob[i]) - exp_of(old[i]);
  } else if (spec.bounds == static_cast<double>(BoundsKind::binary_kl)) {
    for (int i = 0; i < n; ++i) {
      const double others = -expm1_of(old[i]);
      const double kl = exp_of(old[i]) * (old[i] - logprob[i]) +
                        others * (log_others(old[i]) - log_others(logprob[i]));
      work.tested[i] = logprob[i] < old[i] ? -kl : kl;
    }
  } else {
    if (spec.trust != 0)
      for (int i = 0; i < n; ++i)
        work.tested[i] = exp_of(clamped(logprob[i] - old[i], -20.0, 20.0));
    return;
  }
  for (int i = 0; i < n; ++i) {
    work.least[i] = -spec.high;
    work.most[i] = spec.high;
  }
}

// The policy term of one token: kinds known when this is compiled leave no branch.
template <int kMax>
PYRL_INLINE void policy_term(const Kinds& kinds, const TokenSpec& spec, const Interval& all,
                             const TokenColumns& in, const Work<kMax>& work, int i,
                             TokenLosses<kMax>& out) {
  const double logprob = column(in, TokenColumn::logprob)[i];
  const double weight = column(in, TokenColumn::weight)[i];
  double advantage = column(in, TokenColumn::advantage)[i];
  const double given = out.log_ratio[i];
  const double log_ratio =
      kinds.one ? 0.0 : clamped(given, spec.log_ratio_low, spec.log_ratio_high);
  const double ratio = kinds.one ? 1.0 : exp_of(log_ratio);
  // Flags are doubles, for which there are selects in every instruction set; 0: the ratio is
  // clamped, without a gradient.
  double active = log_ratio == given ? 1.0 : 0.0;
  double low = all.base + all.sign * all.low, high = all.base + all.high;
  double tested = ratio, least = low, most = high, dual = spec.dual, factor = 1;
  if (!kinds.plain) {
    low = work.low[i];
    high = work.high[i];
    least = work.least[i];
    most = work.most[i];
    tested = all.ratio * ratio + work.tested[i];
    dual = work.dual[i];
    factor = work.factor[i];
    active = work.away[i] > spec.pre_clip ? 0.0 : active;
    // HAPO: heat counts more outside half the bounds, less inside.
    const double inside =
        ratio > 0.5 * (1.0 + low) ? (ratio < 0.5 * (1.0 + high) ? 1.0 : 0.0) : 0.0;
    const double chosen = work.heat[i] > 0 ? 1.0 - inside : inside;
    const double heat = chosen != 0 ? work.heat[i] : 0.0;
    advantage *= 1.0 + spec.redistribute * heat;
  }
  const double above = advantage > 0 ? (tested > most ? 1.0 : 0.0) : 0.0;
  const double below = advantage < 0 ? (tested < least ? 1.0 : 0.0) : 0.0;
  const double bounded = clamped(ratio, low, high);
  // One after the other: GCC makes single bits of an `or` of comparisons.
  double value = above != 0 ? bounded : ratio;  // V
  value = below != 0 ? bounded : value;
  double gate = above != 0 ? 0.0 : ratio;  // G
  gate = below != 0 ? 0.0 : gate;
  if (kinds.surrogate == SurrogateKind::mask_logp) {
    gate = smaller(gate, spec.cap);
    value = gate * logprob;
  } else if (kinds.surrogate == SurrogateKind::clamp_logp) {
    gate = bounded;
    value = gate * logprob;
  } else if (kinds.surrogate == SurrogateKind::gppo) {
    gate = active != 0 ? gate : 0.0;
    gate = above != 0 ? spec.outer_high * value : gate;
    gate = below != 0 ? spec.outer_low * value : gate;
    value = above * spec.outer_value != 0 ? gate : value;
    value = below * spec.outer_value != 0 ? gate : value;
  } else {
    if (kinds.surrogate == SurrogateKind::sigmoid) {
      const double tau = advantage > 0 ? spec.tau_positive : spec.tau_other;
      const double s = 1.0 / (1.0 + exp_of(tau * (1.0 - value)));
      value = (4.0 / tau) * s;
      gate *= 4.0 * (s * (1.0 - s));
    }
    gate = active != 0 ? gate : 0.0;
  }
  double loss = -advantage * value, slope = -advantage * gate;
  const double most_loss = -advantage * dual;
  const double capped = advantage < 0 ? (loss > most_loss ? 1.0 : 0.0) : 0.0;
  loss = capped != 0 ? most_loss : loss;
  slope = capped != 0 ? 0.0 : slope;
  if (!kinds.plain) {
    loss = factor != 0 ? factor * loss : 0.0;
    slope = factor != 0 ? factor * slope : 0.0;
  }
  out.loss[i] = loss;
  out.logprob_grad[i] = slope;
  out.ratio[i] = ratio;
  out.log_ratio[i] = log_ratio;
  out.clipped_low[i] = below != 0 ? weight : 0.0;
  out.clipped_high[i] = above != 0 ? weight : 0.0;
  out.clipped_dual[i] = capped != 0 ? weight : 0.0;
}

template <SurrogateKind surrogate, bool one, bool plain, int kMax>
PYRL_INLINE void policy_terms(const TokenSpec& spec, const TokenColumns& in, int n,
                              const Work<kMax>& work, TokenLosses<kMax>& out) {
  const Kinds kinds{surrogate, one, plain};
  const Interval all = interval_of(spec);
  for (int i = 0; i < n; ++i) policy_term(kinds, spec, all, in, work, i, out);
}

template <SurrogateKind surrogate, int kMax>
PYRL_INLINE void policy_terms(const Kinds& kinds, const TokenSpec& spec, const TokenColumns& in,
                              int n, const Work<kMax>& work, TokenLosses<kMax>& out) {
  if (kinds.plain && kinds.one && surrogate == SurrogateKind::mask_logp)
    policy_terms<surrogate, surrogate == SurrogateKind::mask_logp, true>(spec, in, n, work, out);
  else if (kinds.plain)
    policy_terms<surrogate, false, true>(spec, in, n, work, out);
  else
    policy_terms<surrogate, false, false>(spec, in, n, work, out);
}

template <int kMax>
PYRL_INLINE void policy_terms(const TokenSpec& spec, const TokenColumns& in, int n,
                              TokenLosses<kMax>& out) {
  Kinds kinds = kinds_of(spec, in);
  // For one token the columns are cheap, and the compiler sees that they are filled.
  if constexpr (kMax == 1) kinds.plain = false;
  Work<kMax> work;
  log_ratio(spec, in, n, out);
  if (!kinds.plain) {
    neutral_columns(spec, in, n, work);
    bounds(spec, in, n, work);
  }
  if constexpr (kMax == 1) {
    policy_term(kinds, spec, interval_of(spec), in, work, 0, out);
  } else if (kinds.surrogate == SurrogateKind::ppo) {
    policy_terms<SurrogateKind::ppo>(kinds, spec, in, n, work, out);
  } else if (kinds.surrogate == SurrogateKind::mask_logp) {
    policy_terms<SurrogateKind::mask_logp>(kinds, spec, in, n, work, out);
  } else if (kinds.surrogate == SurrogateKind::clamp_logp) {
    policy_terms<SurrogateKind::clamp_logp>(kinds, spec, in, n, work, out);
  } else if (kinds.surrogate == SurrogateKind::gppo) {
    policy_terms<SurrogateKind::gppo>(kinds, spec, in, n, work, out);
  } else {
    policy_terms<SurrogateKind::sigmoid>(kinds, spec, in, n, work, out);
  }
}

template <int kMax>
PYRL_HD static inline void regularize(const TokenSpec& spec, const TokenColumns& in, int n,
                                      TokenLosses<kMax>& out) {
  for (int k = 0; k < kPenalties; ++k) {
    const Penalty kind = static_cast<Penalty>(static_cast<int>(spec.penalty[k]));
    if (kind == Penalty::none) continue;
    Terms<kMax> terms;
    divergence(kind, spec.leak, column(in, TokenColumn::logprob),
               in.column[static_cast<int>(TokenColumn::target_0) + k],
               in.column[static_cast<int>(TokenColumn::scale_0) + k], n, terms);
    const double coef = spec.penalty_coef[k];
    if (k == 0)
      for (int i = 0; i < n; ++i) out.penalty[i] = terms.value[i];
    if (coef == 0) continue;
    for (int i = 0; i < n; ++i) {
      out.loss[i] += coef * terms.value[i];
      out.logprob_grad[i] += coef * terms.slope[i];
    }
  }
  const double* entropy = column(in, TokenColumn::entropy);
  if (spec.entropy_coef != 0)
    for (int i = 0; i < n; ++i) out.loss[i] -= spec.entropy_coef * entropy[i];
  const double* addend = column(in, TokenColumn::addend);
  if (addend)
    for (int i = 0; i < n; ++i) out.loss[i] += addend[i];
}

}  // namespace token

// Losses of the first n <= kMax tokens of the columns.
template <int kMax>
PYRL_HD static inline void token_losses(const TokenSpec& spec, const TokenColumns& in, int n,
                                        TokenLosses<kMax>& out) {
  token::policy_terms(spec, in, n, out);
  token::regularize(spec, in, n, out);
  const double* weight = column(in, TokenColumn::weight);
  for (int i = 0; i < n; ++i) {
    const bool used = weight[i] != 0;
    out.loss[i] = used ? out.loss[i] : 0.0;
    out.logprob_grad[i] = used ? weight[i] * out.logprob_grad[i] : 0.0;
  }
}

struct TokenLoss {
  double loss, logprob_grad, entropy_grad;
};

PYRL_INLINE double entropy_grad(const TokenSpec& spec, double weight) {
  return weight != 0 ? -weight * spec.entropy_coef : 0.0;
}

// Of token t, with the log-probability and entropy of this moment.
PYRL_HD static inline TokenLoss token_loss(const TokenSpec& spec, const TokenColumns& columns,
                                           std::int64_t t, double logprob, double entropy) {
  TokenColumns in = from(columns, t);
  in.column[static_cast<int>(TokenColumn::logprob)] = &logprob;
  in.column[static_cast<int>(TokenColumn::entropy)] = &entropy;
  TokenLosses<1> out;
  token_losses(spec, in, 1, out);
  return {out.loss[0], out.logprob_grad[0], entropy_grad(spec, *column(in, TokenColumn::weight))};
}

}  // namespace pyrl
