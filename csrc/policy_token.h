// The part of a policy loss that is local to a token: from its log-probability and columns that
// hold for the whole update to its loss and the gradients with respect to log-probability and
// entropy. With R the ratio, A the advantage and [low, high] the bounds, the surrogate's value V
// and gate G give loss = -A V and d loss / d logprob = -A G; the dual clip caps the loss, a
// detached factor multiplies both, penalties and entropy add to them, and a weight aggregates. The
// same source serves the loop over all tokens, one visit to a row of logits (one token) and CUDA: a
// token's numbers are the same bits, however many are computed together. C++17.
#pragma once

#include "policy_penalty.h"

namespace pyrl {

// Columns of float64, one number per token; null where the loss does not use it.
enum class TokenColumn : int {
  logprob,    // of the current policy
  entropy,    // of the current policy
  anchor,     // log-probability in the ratio's denominator
  trust,      // log-probability in the denominator of the ratio that the bounds test
  log_ratio,  // RatioKind::given: of a sequence or prefix, this token's share included
  advantage,
  weight,  // in the sum over tokens; 0: the token takes no part, whatever it holds
  low,     // bounds; null: TokenSpec::low, high and dual
  high,
  dual,
  factor,  // detached, of the policy term; null: 1
  heat,    // HAPO's normalised log-entropy in [-1, 1]
  addend,  // to the loss, without a gradient; null: 0
  target_0,
  target_1,
  target_2,  // log-probability that a penalty is measured from
  scale_0,
  scale_1,
  scale_2,  // of a penalty; 0 selects the token out of it; null: 1
  count
};

inline constexpr int kTokenColumns = static_cast<int>(TokenColumn::count);
inline constexpr int kPenalties = 3;

enum class RatioKind : int { one, token, given };
enum class BoundsKind : int {
  none,
  radius,           // 1 - low <= R <= 1 + high
  range,            // low <= R <= high
  total_variation,  // |pi - pi_old| <= high, one-sided by the sign of A
  binary_kl,        // KL of {label, others} <= high, likewise
};
enum class SurrogateKind : int {
  ppo,         // V = R inside, the bound outside; G = R inside, 0 outside
  mask_logp,   // V = G logprob; G = min(R, cap) inside, 0 outside
  clamp_logp,  // V = G logprob; G = R clipped
  gppo,        // ppo with a gradient outside: G = outer times the bound
  sigmoid,     // V = 4 / tau sigmoid(tau (R - 1))
};
// All numbers are doubles, so that a loss travels as one list; kinds are their enumerators' values.
struct TokenSpec {
  double ratio;
  double log_ratio_low, log_ratio_high;  // clamp of log R; a clamped ratio has no gradient
  double pre_clip;  // no gradient where log R moved further than this; infinity: off
  double bounds;
  double low, high;
  double widen;  // HAPO: low (1 - widen heat) where heat < 0, high (1 + widen heat) where heat > 0
  double trust;  // 1: the bounds test exp(logprob - trust) in place of R
  double surrogate;
  double cap;
  double outer_low, outer_high, outer_value;  // outer_value 1: V is scaled outside as G is
  double tau_positive, tau_other;             // by A > 0
  double dual;                                // loss <= -A dual where A < 0; infinity: off
  double redistribute;                        // HAPO: A (1 + redistribute heat); 0: off
  double penalty[kPenalties];
  double penalty_coef[kPenalties];
  double leak;
  double entropy_coef;
};

inline constexpr int kTokenSpecSize = sizeof(TokenSpec) / sizeof(double);

struct TokenColumns {
  const double* column[kTokenColumns];
};

PYRL_HD static inline const double* column(const TokenColumns& in, TokenColumn name) {
  return in.column[static_cast<int>(name)];
}

// The columns from token t on.
PYRL_HD static inline TokenColumns from(const TokenColumns& in, std::int64_t t) {
  TokenColumns result = in;
  for (int c = 0; c < kTokenColumns; ++c)
    if (in.column[c]) result.column[c] = in.column[c] + t;
  return result;
}

// Of up to kMax tokens.
template <int kMax>
struct TokenLosses {
  double loss[kMax];  // not multiplied by the weight
  double logprob_grad[kMax], entropy_grad[kMax];
  double ratio[kMax], log_ratio[kMax];
  double clipped_low[kMax], clipped_high[kMax], clipped_dual[kMax];  // 0 or 1
  double penalty[kMax];                                              // value of the first one
};

namespace token {

template <int kMax>
struct Work {
  double advantage[kMax];
  double active[kMax];  // 0: the ratio is clamped, without a gradient
  double tested[kMax];  // what the bounds test: beyond[low] < tested < beyond[high] is inside
  double least[kMax], most[kMax];
  double low[kMax], high[kMax];  // of the ratio's value
  double gate[kMax];             // G
};

template <int kMax>
PYRL_HD static inline void ratio(const TokenSpec& spec, const TokenColumns& in, int n,
                                 Work<kMax>& work, TokenLosses<kMax>& out) {
  const double* logprob = column(in, TokenColumn::logprob);
  const double* anchor = column(in, TokenColumn::anchor);
  const double* given = column(in, TokenColumn::log_ratio);
  const double* advantage = column(in, TokenColumn::advantage);
  if (spec.ratio == static_cast<double>(RatioKind::one)) {
    for (int i = 0; i < n; ++i) out.log_ratio[i] = 0;
  } else if (spec.ratio == static_cast<double>(RatioKind::token)) {
    for (int i = 0; i < n; ++i) out.log_ratio[i] = logprob[i] - anchor[i];
  } else {
    for (int i = 0; i < n; ++i) out.log_ratio[i] = given[i];
  }
  for (int i = 0; i < n; ++i) work.advantage[i] = advantage[i];
  if (spec.ratio == static_cast<double>(RatioKind::one)) {
    for (int i = 0; i < n; ++i) work.active[i] = out.ratio[i] = 1;
    return;
  }
  const double low = spec.log_ratio_low, high = spec.log_ratio_high;
  for (int i = 0; i < n; ++i) {
    const double value = clamped(out.log_ratio[i], low, high);
    work.active[i] = value == out.log_ratio[i] ? 1.0 : 0.0;
    out.log_ratio[i] = value;
    out.ratio[i] = exp_of(value);
  }
  if (spec.pre_clip < kInfinity) {
    for (int i = 0; i < n; ++i) {
      const double moved = logprob[i] - anchor[i];
      const double away = advantage[i] < 0 ? -moved : moved;
      work.active[i] = away > spec.pre_clip ? 0.0 : work.active[i];
    }
  }
}

// log(1 - exp(logprob)), at least log(1e-12).
PYRL_HD static inline double log_others(double logprob) {
  return log_of(larger(-expm1_of(logprob), 1e-12));
}

template <int kMax>
PYRL_HD static inline void bounds(const TokenSpec& spec, const TokenColumns& in, int n,
                                  Work<kMax>& work, const TokenLosses<kMax>& out) {
  const double* logprob = column(in, TokenColumn::logprob);
  const double* old =
      spec.trust != 0 ? column(in, TokenColumn::trust) : column(in, TokenColumn::anchor);
  const double* low = column(in, TokenColumn::low);
  const double* high = column(in, TokenColumn::high);
  const bool radius = spec.bounds == static_cast<double>(BoundsKind::radius);
  const bool range = spec.bounds == static_cast<double>(BoundsKind::range);
  for (int i = 0; i < n; ++i) {
    work.low[i] = -kInfinity;
    work.high[i] = kInfinity;
    work.tested[i] = out.ratio[i];
  }
  if (radius || range) {
    const double base = radius ? 1.0 : 0.0, sign = radius ? -1.0 : 1.0;
    for (int i = 0; i < n; ++i) work.low[i] = base + sign * (low ? low[i] : spec.low);
    for (int i = 0; i < n; ++i) work.high[i] = base + (high ? high[i] : spec.high);
    if (spec.widen != 0) {
      const double* heat = column(in, TokenColumn::heat);
      for (int i = 0; i < n; ++i) {
        work.low[i] = 1.0 - (1.0 - work.low[i]) * (1.0 - spec.widen * smaller(heat[i], 0.0));
        work.high[i] = 1.0 + (work.high[i] - 1.0) * (1.0 + spec.widen * larger(heat[i], 0.0));
      }
    }
    if (spec.trust != 0)
      for (int i = 0; i < n; ++i)
        work.tested[i] = exp_of(clamped(logprob[i] - old[i], -20.0, 20.0));
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
    return;
  }
  for (int i = 0; i < n; ++i) {
    work.least[i] = -spec.high;
    work.most[i] = spec.high;
  }
}

// HAPO's redistribution of advantages: more heat counts outside half the bounds, less inside.
template <int kMax>
PYRL_HD static inline void redistribute(const TokenSpec& spec, const TokenColumns& in, int n,
                                        Work<kMax>& work, const TokenLosses<kMax>& out) {
  const double* heat = column(in, TokenColumn::heat);
  for (int i = 0; i < n; ++i) {
    const double low = 0.5 * (1.0 + work.low[i]), high = 0.5 * (1.0 + work.high[i]);
    const double inside = out.ratio[i] > low ? (out.ratio[i] < high ? 1.0 : 0.0) : 0.0;
    const double chosen = heat[i] > 0 ? 1.0 - inside : inside;
    work.advantage[i] *= chosen != 0 ? 1.0 + spec.redistribute * heat[i] : 1.0;
  }
}

template <int kMax>
PYRL_HD static inline void outside(int n, const Work<kMax>& work, TokenLosses<kMax>& out) {
  for (int i = 0; i < n; ++i) {
    const double above = work.tested[i] > work.most[i] ? 1.0 : 0.0;
    const double below = work.tested[i] < work.least[i] ? 1.0 : 0.0;
    out.clipped_high[i] = work.advantage[i] > 0 ? above : 0.0;
    out.clipped_low[i] = work.advantage[i] < 0 ? below : 0.0;
  }
}

// Leaves V in `loss` and G in `gate`.
template <int kMax>
PYRL_HD static inline void surrogate(const TokenSpec& spec, const TokenColumns& in, int n,
                                     Work<kMax>& work, TokenLosses<kMax>& out) {
  const double* logprob = column(in, TokenColumn::logprob);
  const SurrogateKind kind = static_cast<SurrogateKind>(static_cast<int>(spec.surrogate));
  double* gate = work.gate;
  for (int i = 0; i < n; ++i) {
    const double cut = out.clipped_low[i] + out.clipped_high[i];
    const double bounded = clamped(out.ratio[i], work.low[i], work.high[i]);
    out.loss[i] = cut != 0 ? bounded : out.ratio[i];
    gate[i] = cut != 0 ? 0.0 : out.ratio[i];
  }
  if (kind == SurrogateKind::mask_logp) {
    for (int i = 0; i < n; ++i) gate[i] = smaller(gate[i], spec.cap);
  } else if (kind == SurrogateKind::clamp_logp) {
    for (int i = 0; i < n; ++i) gate[i] = clamped(out.ratio[i], work.low[i], work.high[i]);
  } else if (kind == SurrogateKind::gppo) {
    for (int i = 0; i < n; ++i) {
      const double outer =
          out.clipped_low[i] != 0 ? spec.outer_low * out.loss[i] : spec.outer_high * out.loss[i];
      const double cut = out.clipped_low[i] + out.clipped_high[i];
      gate[i] = cut != 0 ? outer : gate[i] * work.active[i];
      out.loss[i] = cut != 0 && spec.outer_value != 0 ? outer : out.loss[i];
    }
    return;
  } else if (kind == SurrogateKind::sigmoid) {
    for (int i = 0; i < n; ++i) {
      const double tau = work.advantage[i] > 0 ? spec.tau_positive : spec.tau_other;
      const double s = 1.0 / (1.0 + exp_of(tau * (1.0 - out.loss[i])));
      out.loss[i] = (4.0 / tau) * s;
      gate[i] *= 4.0 * (s * (1.0 - s));
    }
  }
  if (kind == SurrogateKind::mask_logp || kind == SurrogateKind::clamp_logp) {
    for (int i = 0; i < n; ++i) out.loss[i] = gate[i] * logprob[i];
  } else {
    for (int i = 0; i < n; ++i) gate[i] = work.active[i] != 0 ? gate[i] : 0.0;
  }
}

// From V and G to the loss and its slope, capped and multiplied by the factor.
template <int kMax>
PYRL_HD static inline void policy_term(const TokenSpec& spec, const TokenColumns& in, int n,
                                       const Work<kMax>& work, TokenLosses<kMax>& out) {
  const double* dual = column(in, TokenColumn::dual);
  const double* factor = column(in, TokenColumn::factor);
  for (int i = 0; i < n; ++i) {
    out.loss[i] = -work.advantage[i] * out.loss[i];
    out.logprob_grad[i] = -work.advantage[i] * work.gate[i];
    out.clipped_dual[i] = 0;
  }
  if (dual || spec.dual < kInfinity) {
    for (int i = 0; i < n; ++i) {
      const double cap = -work.advantage[i] * (dual ? dual[i] : spec.dual);
      const double negative = work.advantage[i] < 0 ? 1.0 : 0.0;
      const double capped = out.loss[i] > cap ? negative : 0.0;
      out.clipped_dual[i] = capped;
      out.loss[i] = capped != 0 ? cap : out.loss[i];
      out.logprob_grad[i] = capped != 0 ? 0.0 : out.logprob_grad[i];
    }
  }
  if (factor) {
    for (int i = 0; i < n; ++i) {
      out.loss[i] = factor[i] != 0 ? factor[i] * out.loss[i] : 0.0;
      out.logprob_grad[i] = factor[i] != 0 ? factor[i] * out.logprob_grad[i] : 0.0;
    }
  }
}

template <int kMax>
PYRL_HD static inline void regularize(const TokenSpec& spec, const TokenColumns& in, int n,
                                      TokenLosses<kMax>& out) {
  for (int i = 0; i < n; ++i) out.penalty[i] = 0;
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
  token::Work<kMax> work;
  token::ratio(spec, in, n, work, out);
  token::bounds(spec, in, n, work, out);
  if (spec.redistribute != 0) token::redistribute(spec, in, n, work, out);
  token::outside(n, work, out);
  token::surrogate(spec, in, n, work, out);
  token::policy_term(spec, in, n, work, out);
  token::regularize(spec, in, n, out);
  const double* weight = column(in, TokenColumn::weight);
  for (int i = 0; i < n; ++i) {
    const bool used = weight[i] != 0;
    out.loss[i] = used ? out.loss[i] : 0.0;
    out.logprob_grad[i] = used ? weight[i] * out.logprob_grad[i] : 0.0;
    out.entropy_grad[i] = used ? -weight[i] * spec.entropy_coef : 0.0;
  }
}

struct TokenLoss {
  double loss, logprob_grad, entropy_grad;
};

// Of token t, with the log-probability and entropy of this moment.
PYRL_HD static inline TokenLoss token_loss(const TokenSpec& spec, const TokenColumns& columns,
                                           std::int64_t t, double logprob, double entropy) {
  TokenColumns in = from(columns, t);
  in.column[static_cast<int>(TokenColumn::logprob)] = &logprob;
  in.column[static_cast<int>(TokenColumn::entropy)] = &entropy;
  TokenLosses<1> out;
  token_losses(spec, in, 1, out);
  return {out.loss[0], out.logprob_grad[0], out.entropy_grad[0]};
}

}  // namespace pyrl
