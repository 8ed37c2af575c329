// Clipped policy-gradient loss per token, with the coefficients that its gradient needs: one pass.
//
// With r = exp(clamp(logprob - old_logprob, -20, 20)), advantage A and radii low, high:
//   policy = max(-A r, -A clip(r, 1 - low, 1 + high)), at most -A dual_clip where A < 0
//   loss   = policy + kl_coef KL(logprob, ref_logprob) - entropy_coef entropy
// PPO: arXiv:1707.06347; per-side radii: arXiv:2503.14476; dual clip: arXiv:1912.09729.
#pragma once

#include <cstdint>
#include <span>

namespace pyrl {

// Estimators of the KL divergence to the reference from D = logprob - ref_logprob. k3 clamps D to
// [-20, 20] and its value to [-10, 10]; a clamped value has no gradient.
enum class KlEstimator : int {
  k1 = 1,  // D
  k2 = 2,  // D^2 / 2
  k3 = 3,  // exp(-D) + D - 1
};

struct PolicyLossSpec {
  double dual_clip;  // infinity: off
  KlEstimator kl;
  double kl_coef;
  double entropy_coef;
};

// All spans have one entry per token; ref_logprob_T may be empty. A token of weight 0 takes no
// part, whatever its other entries are: its loss and coefficients are 0.
template <typename Real>
struct PolicyLossArgs {
  std::span<const Real> logprob_T, entropy_T, old_logprob_T, advantage_T, weight_T;
  std::span<const Real> clip_low_T, clip_high_T, ref_logprob_T;
  PolicyLossSpec spec;
  std::span<Real> loss_T;          // not multiplied by the weight
  std::span<Real> logprob_grad_T;  // d(sum weight loss) / d logprob
  std::span<Real> entropy_grad_T;  // d(sum weight loss) / d entropy
};

// Sums over tokens, in their order; all but ratio_max are multiplied by the weight.
struct PolicyLossTotals {
  double loss = 0;
  double weight = 0;
  double clipped_low = 0;   // A < 0 and r below 1 - low
  double clipped_high = 0;  // A > 0 and r above 1 + high
  double clipped_dual = 0;  // A < 0 and r above dual_clip
  double kl_old = 0;        // r - 1 - log r
  double kl_ref = 0;        // the chosen estimator
  double ratio = 0;
  double ratio_max = 0;
};

template <typename Real>
PolicyLossTotals policy_loss(const PolicyLossArgs<Real>& args);

}  // namespace pyrl
