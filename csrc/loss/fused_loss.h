// One-go: statistics of a row of logits, the policy loss of its token and the gradient with respect
// to the logits in one visit to the row, while it is in the cache. For losses that are local to a
// token; the same numbers as token_stats, policy_loss and token_stats_grad one after the other, for
// an upstream gradient of 1, bit for bit (of CUDA, which is compiled without contraction of
// products and sums, shown in emulation alone).
#pragma once

#include "logits/stats/token_stats.h"
#include "loss/token.h"

namespace pyrl::loss {

struct FusedLossArgs {
  logits::stats::TokenStatsArgs stats;  // logprob and entropy among its outputs
  TokenSpec spec;
  TokenColumns columns;  // without logprob and entropy, which are the row's
  void* grad_TV;         // of the logits' type; may be the logits
  std::int64_t grad_row_stride;
};

void fused_loss(const FusedLossArgs& args, int threads);

// On the caller's stream (a cudaStream_t); all pointers are device pointers. Of the statistics
// logprob, entropy and logsumexp alone, of at most 1310720 columns.
void fused_loss_cuda(const FusedLossArgs& args, int device, void* stream);

}  // namespace pyrl::loss
