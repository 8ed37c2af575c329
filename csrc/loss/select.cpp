// Choices of tokens that policy_terms.h declares.
#include <cstring>

#include "base/random.h"
#include "loss/kernels.h"
#include "loss/statistics.h"
#include "loss/terms.h"

namespace pyrl::loss {
namespace {

void copy_mask(const Responses& responses, std::uint8_t* keep_T) {
  for (std::size_t t = 0; t < responses.tokens; ++t) keep_T[t] = responses.used(t);
}

struct Covariance {
  double advantage, logprob;  // means

  explicit Covariance(const LossColumns& in) {
    advantage = mean(in.responses, value_of(in.advantage));
    logprob = mean(in.responses, value_of(in.logprob));
  }
  double operator()(double a, double l) const { return (a - advantage) * (l - logprob); }
};

// p (H + log p) of a block, p that of the rollout or of the old policy.
void scores(const LossColumns& in, bool rollout, TokenBlock& block, double* out) {
  const double* logprob = block(rollout ? in.rollout_logprob : in.old_logprob);
  const double* entropy = block(in.entropy);
  for (int i = 0; i < block.n; ++i) out[i] = logprob[i];
  policy_kernels().exp(out, block.n);
  for (int i = 0; i < block.n; ++i) out[i] *= entropy[i] + logprob[i];
  block.buffers -= 2;
}

// H sum p^2 + sum p^2 log p - p (H + log p) of a block.
void centred_scores(const LossColumns& in, bool rollout, TokenBlock& block, double* out) {
  scores(in, rollout, block, out);
  const double* entropy = block(in.entropy);
  const double* p2 = block(in.sum_p2);
  const double* p2_logp = block(in.sum_p2_logp);
  for (int i = 0; i < block.n; ++i) out[i] = (entropy[i] * p2[i] + p2_logp[i]) - out[i];
  block.buffers -= 3;
}

double mismatch_value(Mismatch mismatch, double x) {
  switch (mismatch) {
    case Mismatch::rho:
    case Mismatch::k1:
      return x;
    case Mismatch::k2:
      return 0.5 * x * x;
    case Mismatch::k3:
      return std::expm1(std::clamp(x, -20.0, 20.0)) - std::clamp(x, -20.0, 20.0);
  }
  return x;
}

}  // namespace

void keep_outside_covariance(const LossColumns& in, double lower, double upper, double share,
                             double clip_low, double clip_high, std::uint64_t seed,
                             std::uint8_t* keep_T) {
  const Covariance covariance(in);
  std::vector<Candidate> candidates;
  copy_mask(in.responses, keep_T);
  visit_tokens(in.responses, [&](TokenBlock& block) {
    const double* advantage = block(in.advantage);
    const double* logprob = block(in.logprob);
    const double* old = block(in.old_logprob);
    for (int i = 0; i < block.n; ++i) {
      const double c = covariance(advantage[i], logprob[i]);
      if (block.used[i] == 0 || !(lower < c && c < upper)) continue;
      const double ratio = std::exp(std::clamp(logprob[i] - old[i], -20.0, 20.0));
      if (advantage[i] > 0 ? ratio > 1 + clip_high : advantage[i] < 0 && ratio < 1 - clip_low)
        continue;
      const std::size_t t = block.begin + static_cast<std::size_t>(i);
      candidates.push_back({uniform(seed, t), t});
    }
  });
  const double count = count_tokens(in.responses, 0, in.responses.tokens);
  mark_least(candidates, share_of(share, count), 0, keep_T);
}

void choose_covariance(const LossColumns& in, double share, std::uint8_t* chosen_T) {
  const Covariance covariance(in);
  std::vector<Candidate> candidates;
  candidates.reserve(in.responses.tokens);
  visit_tokens(in.responses, [&](TokenBlock& block) {
    const double* advantage = block(in.advantage);
    const double* logprob = block(in.logprob);
    for (int i = 0; i < block.n; ++i) {
      const std::size_t t = block.begin + static_cast<std::size_t>(i);
      if (block.used[i] == 0) continue;
      const double c = covariance(advantage[i], logprob[i]);
      check_ordered("advantage_T, logprob_T", c, t);
      candidates.push_back({-c, t});
    }
  });
  std::memset(chosen_T, 0, in.responses.tokens);
  mark_least(candidates, share_of(share, static_cast<double>(candidates.size())), 1, chosen_T);
}

void choose_improbable(const LossColumns& in, double share, std::uint8_t* chosen_T) {
  std::vector<Candidate> candidates;
  for (std::size_t t = 0; t < in.responses.tokens; ++t) {
    if (!in.responses.used(t) || !(in.advantage[t] < 0)) continue;
    candidates.push_back({in.logprob[t], t});
    check_ordered("logprob_T", candidates.back().value, t);
  }
  std::memset(chosen_T, 0, in.responses.tokens);
  const std::size_t k = share_of(share, static_cast<double>(candidates.size()));
  if (k <= 1) return;
  mark_least(candidates, k, 1, chosen_T);
  for (std::size_t t = 0; t < in.responses.tokens; ++t)
    chosen_T[t] = chosen_T[t] && in.logprob[t] < in.proxy_logprob[t];
}

void keep_by_score(const LossColumns& in, bool rollout, double mu, std::uint8_t* keep_T) {
  const Moments score = moments(
      in.responses, [&](TokenBlock& block, double* out) { scores(in, rollout, block, out); });
  const double deviation = score.population();
  const double least =
      deviation < 1e-12 ? -std::numeric_limits<double>::infinity() : score.mean - mu * deviation;
  visit_tokens(in.responses, [&](TokenBlock& block) {
    const double* advantage = block(in.advantage);
    double* s = block.work();
    scores(in, rollout, block, s);
    for (int i = 0; i < block.n; ++i)
      keep_T[block.begin + i] = block.used[i] != 0 && !(advantage[i] < 0 && s[i] < least);
  });
}

void keep_by_centred_score(const LossColumns& in, bool rollout, double mu, double max_share,
                           std::uint8_t* keep_T) {
  const Moments score = moments(in.responses, [&](TokenBlock& block, double* out) {
    centred_scores(in, rollout, block, out);
  });
  copy_mask(in.responses, keep_T);
  const double deviation = score.population();
  if (deviation < 1e-12) return;
  std::vector<Candidate> candidates;
  visit_tokens(in.responses, [&](TokenBlock& block) {
    const double* advantage = block(in.advantage);
    double* x = block.work();
    centred_scores(in, rollout, block, x);
    for (int i = 0; i < block.n; ++i)
      if (block.used[i] != 0 && !(advantage[i] > 0) && x[i] > mu * deviation)
        candidates.push_back({-x[i], block.begin + static_cast<std::size_t>(i)});
  });
  mark_least(candidates, share_of(max_share, score.count), 0, keep_T);
}

void keep_top_entropy(const LossColumns& in, double share, std::uint8_t* keep_T) {
  copy_mask(in.responses, keep_T);
  std::vector<double> values =
      used_values("entropy_T", in.entropy, in.responses, 0, in.responses.tokens);
  if (values.empty()) return;
  const double threshold = linear_quantile(values, 1 - share);
  for (std::size_t t = 0; t < in.responses.tokens; ++t)
    keep_T[t] = keep_T[t] && in.entropy[t] >= threshold;
}

void keep_matched(const LossColumns& in, Mismatch mismatch, Level level, double low, double high,
                  std::uint8_t* keep_T) {
  const auto x = [&](std::size_t t) { return in.old_logprob[t] - in.rollout_logprob[t]; };
  const bool rho = mismatch == Mismatch::rho;  // exp(x) is tested on x
  const double least = rho ? std::log(low) : low, largest = rho ? std::log(high) : high;
  const auto kept = [&](double value) { return least <= value && value <= largest; };
  visit_leaves(in.responses, [&](std::size_t, std::size_t begin, std::size_t end) {
    double sum = 0, maximum = -std::numeric_limits<double>::infinity();
    for (std::size_t t = begin; t < end; ++t) {
      const double value = mismatch_value(mismatch, x(t));
      keep_T[t] = in.responses.used(t) && (level != Level::token || kept(value));
      if (!in.responses.used(t)) continue;
      sum += value;
      maximum = std::max(maximum, value);
    }
    if (level == Level::token) return;
    const double mean = sum / std::max(count_tokens(in.responses, begin, end), 1.0);
    const double stat = level == Level::seq_sum ? sum : level == Level::seq_mean ? mean : maximum;
    if (!kept(stat)) std::fill(keep_T + begin, keep_T + end, std::uint8_t{0});
  });
}

void keep_near_generator(const LossColumns& in, double gamma, std::uint8_t* keep_T) {
  visit_leaves(in.responses, [&](std::size_t, std::size_t begin, std::size_t end) {
    const double kl = sum_tokens(in.responses, begin, end, [&](TokenBlock& block, double* out) {
      const double* old = block(in.old_logprob);
      const double* rollout = block(in.rollout_logprob);
      for (int i = 0; i < block.n; ++i) out[i] = rollout[i] - old[i];
    });
    for (std::size_t t = begin; t < end; ++t)
      keep_T[t] = in.responses.used(t) && (in.advantage[t] > 0 || kl < gamma);
  });
}

}  // namespace pyrl::loss
