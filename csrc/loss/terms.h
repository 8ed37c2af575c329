// What a token's loss takes from the whole mini-batch: columns computed once per update, in float64
// and in token order, over the tokens that take part. Formulas: the papers named in pyrl/loss.py.
#pragma once

#include <cstdint>
#include <span>

#include "loss/column.h"

namespace pyrl::loss {

// Columns that a function does not name may be missing.
struct LossColumns {
  Responses responses;
  Column logprob, entropy, nucleus_entropy, old_logprob, rollout_logprob, proxy_logprob;
  Column second_logprob, advantage, reward, sum_p2, sum_p2_logp;
  const std::int64_t* group_N = nullptr;  // from 0
};

// The statistic of a response (or token) that a bound is tested on.
enum class Level : int { token, seq_sum, seq_mean, seq_max };
// Of x = log(old / rollout): exp(x), x, x^2 / 2, exp(x) - 1 - x. Sum and mean of rho: exp of those
// of x.
enum class Mismatch : int { rho, k1, k2, k3 };

// -- advantages: written to advantage_T --

// A (1 + k (H - mean H) / std H), the unbiased deviation.
void entropy_advantage(const LossColumns& in, double k, double* advantage_T);
// (1 - alpha) A + alpha R exp(second - old), alpha = a / (1 + a), a = distance / share rewarded.
void blend_advantage(const LossColumns& in, double target, double limit, double measured,
                     double* advantage_T);
// Rewards normalised by mean and deviation of all tokens of the question; where one of them is
// `limit` or more, the question keeps its advantages.
void token_group_advantage(const LossColumns& in, double limit, double* advantage_T);
// Rewards: their positive part above `high` nats of mean entropy, their negative part below `low`,
// in between the advantages.
void band_advantage(const LossColumns& in, double low, double high, double* advantage_T);

// max(A, 0) or min(A, 0).
void sign_advantage(const LossColumns& in, bool positive, double* advantage_T);

// -- factors of the policy term --

// min(max(rho, floor), cap) of a token or of the product over a response; then divided by its mean
// over tokens or responses, if `normalize`.
void importance(const LossColumns& in, Level level, double cap, double floor, bool normalize,
                double* factor_T);
// rho where it lies in [low, high], else 0.
void importance_window(const LossColumns& in, double low, double high, double* factor_T);
// Smaller for tokens whose update changes the entropy more: Omega = r A (1 - pi) (log pi + H).
void steer(const LossColumns& in, bool exponential, double least, double most, double* factor_T);

// HAPO: log entropy about its 0.8 quantile, scaled to [-1, 1]; 0 outside the mask.
void entropy_heat(const LossColumns& in, double* heat_T);

// EPO: `height` where the entropy (of a token, or the mean of a response) is not inside the band.
void entropy_band(const LossColumns& in, Level level, double low, double high, double height,
                  double* addend_T);

// SIREN: mean over responses of the mean nucleus entropy of their peaks, the tokens above the
// response's quantile (linear interpolation); weight_T is its derivative.
double nucleus_peaks(const LossColumns& in, double quantile, double* weight_T);

// |A|, negative where the reward exceeds `passed`.
void expert_scale(const LossColumns& in, double passed, double* scale_T);

// -- choices of tokens: 1 or 0, 0 outside the mask --

// All but a random share of the tokens with lower < cov < upper whose ratio is not clipped; cov is
// the product of centred advantage and log-probability. Token t draws uniform(seed, t).
void keep_outside_covariance(const LossColumns& in, double lower, double upper, double share,
                             double clip_low, double clip_high, std::uint64_t seed,
                             std::uint8_t* keep_T);
// The max(1, int(share n)) tokens of largest cov; equal ones by index.
void choose_covariance(const LossColumns& in, double share, std::uint8_t* chosen_T);
// Of the tokens with A < 0, the max(1, int(share n)) of least log-probability, where that is below
// the proxy's; none if that count is 1.
void choose_improbable(const LossColumns& in, double share, std::uint8_t* chosen_T);
// Drops A < 0 with S = p (H + log p) more than mu deviations below its mean; p of the rollout.
void keep_by_score(const LossColumns& in, bool rollout, double mu, std::uint8_t* keep_T);
// Drops A <= 0 with N - S above mu deviations, N = H sum p^2 + sum p^2 log p, but at most
// max(1, int(max_share n)) tokens, the largest first.
void keep_by_centred_score(const LossColumns& in, bool rollout, double mu, double max_share,
                           std::uint8_t* keep_T);
// The tokens of at least the quantile 1 - share of entropy (linear interpolation).
void keep_top_entropy(const LossColumns& in, double share, std::uint8_t* keep_T);
// Tokens whose mismatch statistic lies in [low, high].
void keep_matched(const LossColumns& in, Mismatch mismatch, Level level, double low, double high,
                  std::uint8_t* keep_T);
// A > 0, or the sum of log(rollout / old) over the response below gamma.
void keep_near_generator(const LossColumns& in, double gamma, std::uint8_t* keep_T);

// Tokens of each response that take part.
void count_tokens(const Responses& responses, std::int64_t* tokens_N);

}  // namespace pyrl::loss
