// The log of a ratio over a response or its prefix, per token: scans and sums along responses, over
// the tokens that take part. With d = logprob - anchor:
#pragma once

#include "loss/column.h"
#include "loss/math.h"

namespace pyrl::loss {

enum class Scan : int {
  none,
  seq_geo,     // mean of d (GSPO)
  seq_prod,    // sum of d
  cum_prod,    // sum of d within [-20, 20] up to and with the token (CTPO)
  cum_geo,     // mean of the same
  min_prefix,  // smallest d before the token (0 at the first) plus its own (MinPRO)
};

inline constexpr double kLogRatioLimit = 20;

// `pre_clip`: d is cut on the side to which the advantage pushes (GMPO), beyond this distance,
// before it is reduced; infinity: not.
PYRL_INLINE double pre_clipped(double d, double advantage, double pre_clip) {
  const double cut = advantage > 0 ? smaller(d, pre_clip) : larger(d, -pre_clip);
  return advantage == 0 ? 0.0 : cut;
}

// What a scan reads: the tokens of leaves first to last (exclusive).
struct ScanArgs {
  Scan scan;
  double pre_clip;
  Column logprob_T, anchor_T, advantage_T;
  const Responses* responses;
  std::size_t first, last;
};

}  // namespace pyrl::loss
