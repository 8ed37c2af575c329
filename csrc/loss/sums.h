// What the loop over tokens adds up and refuses, for one token or several at a time. C++17, also
// nvcc.
#pragma once

#include "loss/token.h"

namespace pyrl::loss {

// Sums of the fields of PolicyLossTotals, and the largest ratio.
template <typename Real>
struct TokenSums {
  Real loss, weight, clipped_low, clipped_high, clipped_dual, kl_old, penalty, ratio, ratio_max;
};

template <typename Real>
PYRL_INLINE void add(TokenSums<Real>& sums, const TokenTerm<Real>& term, const token::Kinds& kinds,
                     const TokenSpec& spec, Real w) {
  const Real zero = 0.0;
  sums.loss = sums.loss + w * term.loss;
  sums.weight = sums.weight + w;
  sums.clipped_low = sums.clipped_low + select(term.below, w, zero);
  sums.clipped_high = sums.clipped_high + select(term.above, w, zero);
  if (kinds.capped) sums.clipped_dual = sums.clipped_dual + select(term.capped, w, zero);
  if (spec.penalty[0] != PenaltyKind::none)
    sums.penalty = sums.penalty + select(w != 0.0, w * term.penalty, zero);
  sums.ratio = sums.ratio + w * term.ratio;
  sums.ratio_max = larger(sums.ratio_max, select(w != 0.0, term.ratio, zero));
  if (kinds.one) return;
  sums.kl_old = sums.kl_old + w * ((term.ratio - 1.0) - term.log_ratio);
}

// An advantage that is not finite, or a negative radius, of a token that takes part.
template <typename Real, typename Columns>
PYRL_INLINE auto refused(const TokenSpec& spec, const Columns& in, Real advantage, Real w) {
  const auto used = w != 0.0;
  auto wrong = used & (advantage - advantage != 0.0);
  if (in.has(TokenColumn::low) && in.has(TokenColumn::high) &&
      token::is(spec, BoundsKind::radius)) {
    const Real least = smaller(in(TokenColumn::low), in(TokenColumn::high));
    wrong = wrong | (used & !((least > 0.0) | (least == 0.0)));
  }
  return wrong;
}

}  // namespace pyrl::loss
