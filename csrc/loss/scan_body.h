// Body of scan_log_ratio, included by the file of each instruction set: internal linkage
// throughout.
#pragma once

#include "loss/lanes.h"
#include "loss/scan.h"

namespace pyrl::loss {
namespace {

PYRL_INLINE Lanes lanes_of(const Column& column, std::size_t t) {
  return column.wide ? load(column.wide + t) : load(column.narrow + t);
}

// d of n tokens, 0 outside the mask.
void differences(const ScanArgs& args, std::size_t begin, int n, double* d) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const std::size_t t = begin + static_cast<std::size_t>(i);
    store(lanes_of(args.logprob_T, t) - lanes_of(args.anchor_T, t), d + i);
  }
  for (; i < n; ++i) {
    const std::size_t t = begin + static_cast<std::size_t>(i);
    d[i] = args.logprob_T[t] - args.anchor_T[t];
  }
  if (args.pre_clip < kInfinity) {
    double buffer[kTokenBlock];
    const double* advantage = read(args.advantage_T, begin, n, buffer);
    for (i = 0; i < n; ++i) d[i] = pre_clipped(d[i], advantage[i], args.pre_clip);
  }
  if (const std::uint8_t* mask_T = args.responses->mask_T)
    for (i = 0; i < n; ++i) d[i] = mask_T[begin + static_cast<std::size_t>(i)] ? d[i] : 0.0;
}

std::int64_t count_used(const Responses& responses, std::size_t begin, std::size_t end) {
  if (!responses.mask_T) return static_cast<std::int64_t>(end - begin);
  std::int64_t count = 0;
  for (std::size_t t = begin; t < end; ++t) count += responses.mask_T[t] != 0;
  return count;
}

// The same number for every token of the response.
void spread_sum(const ScanArgs& args, std::size_t begin, std::size_t end, double* d) {
  Lanes lanes = 0.0;
  double block[kTokenBlock];
  int i = 0, n = 0;  // of the last block
  for_blocks(begin, end, [&](std::size_t t, int size) {
    differences(args, t, n = size, block);
    for (i = 0; i + kLanes <= n; i += kLanes) lanes = lanes + load(block + i);
  });
  LaneSum sum;
  store(lanes, sum.lane);
  add(sum, block + i, n - i);
  const bool mean = args.scan == Scan::seq_geo;
  const std::int64_t count = mean ? count_used(*args.responses, begin, end) : 1;
  std::fill(d, d + (end - begin), count ? total(sum) / static_cast<double>(count) : 0.0);
}

void prefix_sum(bool mean, const Responses& responses, std::size_t begin, std::size_t end,
                double* d) {
  double sum = 0;
  std::int64_t count = 0;
  for (std::size_t t = begin; t < end; ++t, ++d) {
    sum += clamped(*d, -kLogRatioLimit, kLogRatioLimit);
    count += responses.used(t);
    *d = mean ? sum / static_cast<double>(std::max<std::int64_t>(count, 1)) : sum;
  }
}

void prefix_minimum(const Responses& responses, std::size_t begin, std::size_t end, double* d) {
  double least = kInfinity;
  for (std::size_t t = begin; t < end; ++t, ++d) {
    if (!responses.used(t)) continue;
    const double own = *d;
    *d = own + (least == kInfinity ? 0.0 : least);
    least = loss::smaller(least, own);
  }
}

// Writes those of the tokens outside the mask as 0, the first token at index 0.
void scan_log_ratio(const ScanArgs& args, double* log_ratio) {
  const Responses& responses = *args.responses;
  const std::size_t origin = static_cast<std::size_t>(responses.offset_N1[args.first]);
  for (std::size_t leaf = args.first; leaf < args.last; ++leaf) {
    const std::size_t begin = static_cast<std::size_t>(responses.offset_N1[leaf]);
    const std::size_t end = static_cast<std::size_t>(responses.offset_N1[leaf + 1]);
    double* d = log_ratio + (begin - origin);
    if (args.scan == Scan::seq_geo || args.scan == Scan::seq_prod) {
      spread_sum(args, begin, end, d);
      continue;
    }
    for_blocks(begin, end, [&](std::size_t t, int n) { differences(args, t, n, d + (t - begin)); });
    if (args.scan == Scan::min_prefix) {
      prefix_minimum(responses, begin, end, d);
    } else {
      prefix_sum(args.scan == Scan::cum_geo, responses, begin, end, d);
    }
  }
}

}  // namespace
}  // namespace pyrl::loss
