// A policy loss as plain numbers: which columns a token's loss reads, and its kinds and constants.
// C++17, also nvcc.
#pragma once

#include "loss/column.h"
#include "loss/penalty.h"

namespace pyrl::loss {

// One number per token; null where the loss does not use it.
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

struct TokenSpec {
  RatioKind ratio;
  double log_ratio_low, log_ratio_high;  // clamp of log R; a clamped ratio has no gradient
  double pre_clip;  // no gradient where log R moved further than this; infinity: off
  BoundsKind bounds;
  double low, high;
  double widen;  // HAPO: low (1 - widen heat) where heat < 0, high (1 + widen heat) where heat > 0
  bool trust;    // the bounds test exp(logprob - trust) in place of R
  SurrogateKind surrogate;
  double cap;
  double outer_low, outer_high;
  bool outer_value;                // V is scaled outside as G is
  double tau_positive, tau_other;  // by A > 0
  double dual;                     // loss <= -A dual where A < 0; infinity: off
  double redistribute;             // HAPO: A (1 + redistribute heat); 0: off
  PenaltyKind penalty[kPenalties];
  double penalty_coef[kPenalties];
  double leak;
  double entropy_coef;
};

struct TokenColumns {
  Column column[kTokenColumns];
};

}  // namespace pyrl::loss
