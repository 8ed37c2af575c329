// Log-probability of a label, entropy, log-sum-exp and confidence of each row of logits at a
// temperature, and the gradient. Also read by nvcc, hence C++17 and plain pointers.
//
// With t_j = log p_j and p = softmax(z / temperature):
//   entropy = -sum_j p_j t_j, confidence = mass of the five most probable tokens,
//   dz_j = (g_logprob 1[j = label] + p_j (g_logsumexp - g_logprob - g_entropy (t_j + entropy)))
//          / temperature.
// A row whose label is -100 has zero outputs and a zero gradient. A row with NaN or +inf has NaN
// outputs and a NaN gradient. A row of -inf alone has logprob = logsumexp = -inf, else zeros.
#pragma once

#include "logit_matrix.h"

namespace pyrl {

// Statistics are float64 whatever the logits are: at an offset of 1e4 a float32 log-sum-exp would
// move every probability of the backward pass by 5e-4.
struct TokenStatsArgs {
  LogitMatrix logits_TV;
  const std::int64_t* label_T;
  double temperature;
  double* logprob_T;
  double* entropy_T;
  double* logsumexp_T;
  double* confidence_T;
};

struct TokenStatsGradArgs {
  LogitMatrix logits_TV;
  const std::int64_t* label_T;
  double temperature;
  const double* entropy_T;
  const double* logsumexp_T;
  const double* grad_logprob_T;
  const double* grad_entropy_T;
  const double* grad_logsumexp_T;
  void* grad_TV;  // of the logits' type; may be the logits
  std::int64_t grad_row_stride;
};

// Throw std::invalid_argument for a label that is neither -100 nor inside the vocabulary. Results
// do not depend on the number of threads.
void token_stats(const TokenStatsArgs& args, int threads);
void token_stats_grad(const TokenStatsGradArgs& args, int threads);

// On the caller's stream (a cudaStream_t); all pointers are device pointers. A label outside the
// vocabulary gives NaN in its row.
void token_stats_cuda(const TokenStatsArgs& args, int device, void* stream);
void token_stats_grad_cuda(const TokenStatsGradArgs& args, int device, void* stream);

}  // namespace pyrl
