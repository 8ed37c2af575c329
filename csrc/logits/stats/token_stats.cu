// A row is split into parts of fixed size, one block of threads each; their sums, merged in order,
// give the statistics. So few rows of a large vocabulary occupy the device as many rows do, a row's
// statistics do not depend on the batch, and nothing is atomic. The gradient is split in the same
// way; fused_loss.cu takes a row's parts one after another, with the same bits.
#include <type_traits>

#include "logits/stats/device_stats.cuh"
#include "logits/stats/token_stats.h"

namespace pyrl::logits::stats {
namespace device {
namespace {

template <typename Element, bool kAll>
__global__ void __launch_bounds__(kThreads)
    part_kernel(TokenStatsArgs args, Wanted wanted, PartSums* part_TP) {
  __shared__ PartSums of_warp[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t t = blockIdx.x, vocabulary = args.logits_TV.vocabulary;
  if (!is_label(args.label_T[t], vocabulary)) return;
  const std::int64_t begin = blockIdx.y * kPart;
  const PartSums sums = warp_sums<Element, kAll>(row_of<Element>(args.logits_TV, t), begin,
                                                 part_end(begin, vocabulary), thread,
                                                 Softcap{args.options.softcap}, wanted);
  if (thread % kWarp == 0) of_warp[thread / kWarp] = sums;
  __syncthreads();
  if (thread == 0) part_TP[t * gridDim.y + blockIdx.y] = combine(of_warp, kWarps, wanted);
}

// One thread per row. Leaves the row's sums in its first part.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(TokenStatsArgs args, Wanted wanted, PartSums* part_TP, std::int64_t parts) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= args.logits_TV.rows) return;
  const std::int64_t label = args.label_T[t];
  if (!is_label(label, args.logits_TV.vocabulary)) {
    return write_all(args, t, label == kIgnoredLabel ? 0.0 : NAN);
  }
  const PartSums sums = combine(part_TP + t * parts, parts, wanted);
  part_TP[t * parts] = sums;
  write_stats(args, t, sums, label_logit(row_of<Element>(args.logits_TV, t), label, args.options));
}

// One block per row.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    threshold_kernel(TokenStatsArgs args, double scale, const PartSums* part_TP,
                     std::int64_t parts) {
  const std::int64_t t = blockIdx.x, vocabulary = args.logits_TV.vocabulary;
  if (!is_label(args.label_T[t], vocabulary)) return;
  const PartSums& sums = part_TP[t * parts];
  if (broken(args, sums) || masked_alone(args, sums)) return;  // written by merge_kernel
  const ThresholdRow<Element> row{row_of<Element>(args.logits_TV, t), vocabulary,
                                  Softcap{args.options.softcap}, scale, sums.maximum};
  if (stat(args, Stat::kept_mass) != nullptr) {
    const double floor = sums.maximum + log(args.options.kept_share) * args.options.temperature;
    const double mass = row.above(fmax(floor, -DBL_MAX)).sum / sums.sum;
    if (threadIdx.x == 0) write(args, Stat::kept_mass, t, fmin(1.0, mass));
  }
  if (!wants_nucleus(args)) return;
  const Crossing ends = crossing([&](double least) { return row.above(least); },
                                 [](const Above& above) { return above.sum; },
                                 args.options.nucleus * sums.sum, sums.maximum, scale);
  const Above& inside = args.options.nucleus_keeps_crossing ? ends.with : ends.without;
  if (threadIdx.x == 0) write_nucleus(args, t, inside, sums.sum);
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) grad_kernel(TokenStatsGradArgs args) {
  const std::int64_t t = blockIdx.x, vocabulary = args.logits_TV.vocabulary;
  const std::int64_t begin = blockIdx.y * kPart;
  write_part_gradient(row_of<Element>(args.logits_TV, t), begin, part_end(begin, vocabulary),
                      static_cast<int>(threadIdx.x), vocabulary, args.label_T[t],
                      row_upstream(args, t), args.options,
                      static_cast<Element*>(args.grad_TV) + t * args.grad_row_stride);
}

}  // namespace
}  // namespace device

void token_stats_cuda(const TokenStatsArgs& args, int device, void* stream) {
  if (args.logits_TV.rows == 0) return;
  using namespace device;
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const std::int64_t rows = args.logits_TV.rows, parts = parts_of(args.logits_TV.vocabulary);
  const Wanted wanted = wanted_by(args);
  const StreamBuffer<PartSums> part_TP(rows * parts, queue);
  with_elements(args.logits_TV, [&](const auto* z) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(z)>>;
    const auto part = wants_more(wanted) ? part_kernel<Element, true> : part_kernel<Element, false>;
    launch(part, {rows, parts}, queue, args, wanted, part_TP.data());
    launch(merge_kernel<Element>, {(rows + kThreads - 1) / kThreads}, queue, args, wanted,
           part_TP.data(), parts);
    if (stat(args, Stat::kept_mass) != nullptr || wants_nucleus(args)) {
      launch(threshold_kernel<Element>, {rows}, queue, args, wanted.scale, part_TP.data(), parts);
    }
  });
}

void token_stats_grad_cuda(const TokenStatsGradArgs& args, int device, void* stream) {
  if (args.logits_TV.rows == 0) return;
  using namespace device;
  const DeviceGuard guard(device);
  with_elements(args.logits_TV, [&](const auto* z) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(z)>>;
    launch(grad_kernel<Element>, {args.logits_TV.rows, parts_of(args.logits_TV.vocabulary)},
           static_cast<cudaStream_t>(stream), args);
  });
}

}  // namespace pyrl::logits::stats
