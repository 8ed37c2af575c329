#include "loss/fused_loss.h"

namespace pyrl::loss {

void fused_loss(const FusedLossArgs& args, int threads) {
  const auto coefficients = [&](std::int64_t t, double logprob, double entropy) {
    const TokenLoss loss = token_loss(args.spec, args.columns, t, logprob, entropy);
    return logits::stats::RowCoefficients{loss.logprob_grad, loss.entropy_grad, 0};
  };
  token_stats_one_go(args.stats, coefficients, args.grad_TV, args.grad_row_stride, threads);
}

}  // namespace pyrl::loss
