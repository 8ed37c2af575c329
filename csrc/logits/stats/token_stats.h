// Statistics of each row of logits at a temperature, and the gradient. Also read by nvcc, hence
// C++17 and plain pointers.
//
// With v = softcap tanh(z / softcap) (v = z without a cap), u = v / temperature, p = softmax(u),
// t_j = log p_j and H = -sum_j p_j t_j, in nats:
//   du_j = g_logprob (1[j = label] - p_j) - g_entropy p_j (t_j + H) + g_logsumexp p_j
//          + g_self_certainty (p_j - 1 / V) - g_nucleus_entropy q_j (log q_j + H_q)
//   dz_j = du_j (1 - (v_j / softcap)^2) / temperature
// where q is p renormalised inside the nucleus, which is taken as constant, and H_q its entropy.
//
// A label of -100 ignores its row: zero statistics, zero gradient. Another label outside the
// vocabulary, a NaN or a +inf in the row: NaN in its statistics and its gradient, and only there.
// A -inf masks its token, with a softcap too, and so does a logit below -9e7 temperature (of
// float64 -3e15), such as the lowest number. A row of masked tokens alone: logprob = logsumexp =
// -inf, the other statistics and the gradient zero. A row whose largest logit is that far above 0:
// NaN.
#pragma once

#include <functional>

#include "logits/matrix.h"

namespace pyrl::logits::stats {

// Statistics are float64 whatever the logits are: at an offset of 1e4 a float32 log-sum-exp would
// move every probability of the backward pass by 5e-4.
enum class Stat : int {
  logprob,            // of the label
  entropy,            // H
  logsumexp,          // of u
  self_certainty,     // KL(uniform || p) = logsumexp - mean_j u_j - log V; +inf with masked tokens
  nucleus_entropy,    // H_q
  nucleus_threshold,  // v at and above which a token is inside; +inf: none is
  nucleus_log_mass,   // log of the sum of p over the nucleus
  confidence,         // mass of the top_k most probable tokens
  max_probability,
  sum_p2,          // sum_j p_j^2
  sum_p2_logp,     // sum_j p_j^2 t_j
  kept_mass,       // mass of p_j >= kept_share max_j p_j
  second_logprob,  // of the label at second_temperature
  count
};
inline constexpr int kStats = static_cast<int>(Stat::count);
inline constexpr const char* kStatNames[] = {
    "logprob",           "entropy",          "logsumexp",     "self_certainty",  "nucleus_entropy",
    "nucleus_threshold", "nucleus_log_mass", "confidence",    "max_probability", "sum_p2",
    "sum_p2_logp",       "kept_mass",        "second_logprob"};
static_assert(sizeof kStatNames == kStats * sizeof *kStatNames, "a name for each statistic");

// Options of statistics that are not asked for are not read.
struct TokenStatsOptions {
  double temperature = 1;
  double softcap = 0;  // 0: none
  int top_k = 1;       // 1 to 8
  double kept_share = 1;
  double second_temperature = 1;
  double nucleus = 1;  // mass of the nucleus: the fewest tokens, the most probable, that reach it
  // Whether the token that reaches it is inside. Equally probable ones are too.
  bool nucleus_keeps_crossing = true;

  // Calls visit(name, pointer to member) for each field.
  template <typename Visit>
  static void each_field(Visit&& visit) {
    visit("temperature", &TokenStatsOptions::temperature);
    visit("softcap", &TokenStatsOptions::softcap);
    visit("top_k", &TokenStatsOptions::top_k);
    visit("kept_share", &TokenStatsOptions::kept_share);
    visit("second_temperature", &TokenStatsOptions::second_temperature);
    visit("nucleus", &TokenStatsOptions::nucleus);
    visit("nucleus_keeps_crossing", &TokenStatsOptions::nucleus_keeps_crossing);
  }
};

struct TokenStatsArgs {
  LogitMatrix logits_TV;
  const std::int64_t* label_T;
  TokenStatsOptions options;
  double* stat_T[kStats];  // null: not asked for
};

struct TokenStatsGradArgs {
  LogitMatrix logits_TV;
  const std::int64_t* label_T;
  TokenStatsOptions options;
  // What the forward pass gave: entropy and logsumexp always, with an upstream gradient of the
  // nucleus its three.
  const double* stat_T[kStats];
  // Upstream gradients of logprob, entropy, logsumexp, self_certainty and nucleus_entropy; null: 0.
  const double* grad_T[kStats];
  void* grad_TV;  // of the logits' type; may be the logits
  std::int64_t grad_row_stride;
};

// Results do not depend on the number of threads. Throw std::invalid_argument for options out of
// their range.
void token_stats(const TokenStatsArgs& args, int threads);
void token_stats_grad(const TokenStatsGradArgs& args, int threads);

// The upstream gradients of one row.
struct RowCoefficients {
  double logprob, entropy, logsumexp;
};
// Called once for each row that is not ignored, with its logprob and entropy, from any thread.
using RowLoss = std::function<RowCoefficients(std::int64_t t, double logprob, double entropy)>;

// Statistics, loss and gradient in one visit to a row: token_stats, loss, token_stats_grad, to the
// bit. grad_TV may be the logits.
void token_stats_one_go(const TokenStatsArgs& args, const RowLoss& loss, void* grad_TV,
                        std::int64_t grad_row_stride, int threads);

// On the caller's stream (a cudaStream_t); all pointers are device pointers.
void token_stats_cuda(const TokenStatsArgs& args, int device, void* stream);
void token_stats_grad_cuda(const TokenStatsGradArgs& args, int device, void* stream);

}  // namespace pyrl::logits::stats
