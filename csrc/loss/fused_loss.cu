// One block per row: the sums of its parts, by two teams of threads in turn and without a barrier
// between parts, then the token's loss, then the gradient of its parts. One block occupies a
// multiprocessor, so that all rows in flight (132 of 300 KB on an H100) fit the L2 cache and the
// second read misses the memory. Parts, sums and gradient are those of token_stats.cu to the bit.
#include <type_traits>

#include "logits/stats/device_stats.cuh"
#include "loss/fused_loss.h"

namespace pyrl::loss {
namespace device {
namespace {

using namespace logits;
using namespace logits::stats;
using namespace logits::stats::device;

constexpr int kTeams = 2;

// The coefficients of row t's gradient, from its statistics; one thread calls it.
__device__ RowUpstream visit_token(const FusedLossArgs& args, std::int64_t t) {
  RowUpstream row = {};
  row.entropy = stat(args.stats, Stat::entropy)[t];
  row.logsumexp = stat(args.stats, Stat::logsumexp)[t];
  const double logprob = stat(args.stats, Stat::logprob)[t];
  const TokenLoss loss = token_loss(args.spec, args.columns, t, logprob, row.entropy);
  row.grad_logprob = loss.logprob_grad;
  row.grad_entropy = loss.entropy_grad;
  return row;
}

template <typename Element>
__global__ void __launch_bounds__(kTeams* kThreads, 1)
    fused_kernel(FusedLossArgs args, Wanted wanted) {
  __shared__ PartSums of_warp[kMostParts * kWarps];
  __shared__ PartSums of_part[kMostParts];
  __shared__ RowUpstream upstream;
  const TokenStatsOptions& options = args.stats.options;
  const int thread = static_cast<int>(threadIdx.x) % kThreads;
  const int team = static_cast<int>(threadIdx.x) / kThreads;
  const std::int64_t t = blockIdx.x, vocabulary = args.stats.logits_TV.vocabulary;
  const int parts = static_cast<int>(parts_of(vocabulary));
  const std::int64_t label = args.stats.label_T[t];
  const Element* row = row_of<Element>(args.stats.logits_TV, t);
  if (is_label(label, vocabulary)) {
    for (std::int64_t part = team; part < parts; part += kTeams) {
      const PartSums sums =
          warp_sums<Element, false>(row, part * kPart, part_end(part * kPart, vocabulary), thread,
                                    Softcap{options.softcap}, wanted);
      if (thread % kWarp == 0) of_warp[part * kWarps + thread / kWarp] = sums;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < parts) {
      of_part[threadIdx.x] = combine(of_warp + threadIdx.x * kWarps, kWarps, wanted);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const PartSums sums = combine(of_part, parts, wanted);
      write_stats(args.stats, t, sums, label_logit(row, label, options));
      upstream = visit_token(args, t);
    }
  } else if (threadIdx.x == 0) {
    write_all(args.stats, t, label == kIgnoredLabel ? 0.0 : NAN);
    upstream = visit_token(args, t);
  }
  __syncthreads();
  Element* out = static_cast<Element*>(args.grad_TV) + t * args.grad_row_stride;
  for (std::int64_t part = team; part < parts; part += kTeams) {
    write_part_gradient(row, part * kPart, part_end(part * kPart, vocabulary), thread, vocabulary,
                        label, upstream, options, out);
  }
}

void check(const FusedLossArgs& args) {
  for (int name = 0; name < kStats; ++name) {
    const Stat each = static_cast<Stat>(name);
    const bool known = each == Stat::logprob || each == Stat::entropy || each == Stat::logsumexp;
    if (known == (stat(args.stats, each) != nullptr)) continue;
    throw std::invalid_argument(
        "fused_loss: on a CUDA device expected the outputs logprob, entropy and logsumexp alone");
  }
  check_columns("fused_loss", args.stats.logits_TV.vocabulary);
}

}  // namespace
}  // namespace device

void fused_loss_cuda(const FusedLossArgs& args, int device, void* stream) {
  using namespace device;
  const LogitMatrix& logits_TV = args.stats.logits_TV;
  if (logits_TV.rows == 0) return;  // empty columns have no address
  check(args);
  const DeviceGuard guard(device);
  with_elements(logits_TV, [&](const auto* z) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(z)>>;
    launch(fused_kernel<Element>, {logits_TV.rows, 1, kTeams * kThreads},
           static_cast<cudaStream_t>(stream), args, wanted_by(args.stats));
  });
}

}  // namespace pyrl::loss
