// Policy-gradient loss per token, aggregated, with the coefficients that its gradient needs. The
// part of a token is csrc/loss/token.h; here are scans along responses, bounds that widen with
// the position, weights of responses, and the sums that a run reports. C++17, also nvcc.
#pragma once

#include <cmath>

#include "base/check.h"
#include "loss/scan.h"
#include "loss/token.h"

namespace pyrl::loss {

// CTPO's bounds [exp(-low t^power), exp(high t^power)] and cap exp(dual t^power), t counting the
// tokens of a response that take part, from 1. power 0: off.
struct PositionBounds {
  double power = 0, low = 0, high = 0, dual = 0;
};

struct PolicyLossArgs {
  Responses responses;
  Column column[kTokenColumns];      // as TokenColumn, without the weight
  const double* weight_N = nullptr;  // of each token of a response; the mask selects
  TokenSpec spec;
  Scan scan = Scan::none;
  PositionBounds position;
  // Outputs of the same type, one per token; null where not asked for.
  bool wide = false;
  void* loss_T = nullptr;          // not multiplied by the weight
  void* logprob_grad_T = nullptr;  // d(sum weight loss) / d logprob
  void* entropy_grad_T = nullptr;  // d(sum weight loss) / d entropy
};

// Sums over tokens, in their order; all but ratio_max are multiplied by the weight.
struct PolicyLossTotals {
  double loss = 0;
  double weight = 0;
  double clipped_low = 0;   // A < 0 and below the bounds
  double clipped_high = 0;  // A > 0 and above the bounds
  double clipped_dual = 0;  // A < 0 and the loss above its cap
  double kl_old = 0;        // r - 1 - log r
  double penalty = 0;       // value of the first penalty, without its coefficient
  double ratio = 0;
  double ratio_max = 0;
};

PolicyLossTotals policy_loss(const PolicyLossArgs& args);

// On the caller's stream (a cudaStream_t), which is waited for. Columns, mask and outputs are
// device pointers; offset_N1 and weight_N are the host's.
PolicyLossTotals policy_loss_cuda(const PolicyLossArgs& args, int device, void* stream);

// Checks token t, which takes part; low and high are 0 without columns of radii.
inline void check_token(std::int64_t t, double advantage, double low, double high) {
  PYRL_CHECK(std::isfinite(advantage), "advantage_T: expected finite numbers, got ", advantage,
             " at ", t);
  PYRL_CHECK(low >= 0 && high >= 0, "clip_low_T, clip_high_T: expected radii >= 0, got ", low,
             " and ", high, " at ", t);
}

}  // namespace pyrl::loss
