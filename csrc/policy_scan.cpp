#include "policy_scan.h"

#include <limits>

#include "policy_math.h"

namespace pyrl {
namespace {

constexpr double kLogRatioLimit = 20;

// d of n tokens, 0 outside the mask.
void differences(const Column& logprob_T, const Column& anchor_T, const Column& advantage_T,
                 double pre_clip, const Segments& segments, std::size_t begin, int n, double* d) {
  double buffer[3][kTokenBlock];
  const double* logprob = read(logprob_T, begin, n, buffer[0]);
  const double* anchor = read(anchor_T, begin, n, buffer[1]);
  for (int i = 0; i < n; ++i) d[i] = logprob[i] - anchor[i];
  if (pre_clip < kInfinity) {
    const double* advantage = read(advantage_T, begin, n, buffer[2]);
    for (int i = 0; i < n; ++i) {
      const double cut = advantage[i] > 0 ? smaller(d[i], pre_clip) : larger(d[i], -pre_clip);
      d[i] = advantage[i] == 0 ? 0.0 : cut;
    }
  }
  if (segments.mask_T)
    for (int i = 0; i < n; ++i) d[i] = segments.mask_T[begin + i] ? d[i] : 0.0;
}

std::int64_t count_used(const Segments& segments, std::size_t begin, std::size_t end) {
  if (!segments.mask_T) return static_cast<std::int64_t>(end - begin);
  std::int64_t count = 0;
  for (std::size_t t = begin; t < end; ++t) count += segments.mask_T[t] != 0;
  return count;
}

// The same number for every token of the response.
void spread_sum(bool mean, const Segments& segments, std::size_t begin, std::size_t end,
                double* d) {
  const std::size_t size = end - begin;
  LaneSum sum;
  for_blocks(0, size, [&](std::size_t t, int n) { add(sum, d + t, n); });
  const std::int64_t count = mean ? count_used(segments, begin, end) : 1;
  std::fill(d, d + size, count ? total(sum) / static_cast<double>(count) : 0.0);
}

void prefix_sum(bool mean, const Segments& segments, std::size_t begin, std::size_t end,
                double* d) {
  double sum = 0;
  std::int64_t count = 0;
  for (std::size_t t = begin; t < end; ++t, ++d) {
    sum += clamped(*d, -kLogRatioLimit, kLogRatioLimit);
    count += segments.used(t);
    *d = mean ? sum / static_cast<double>(std::max<std::int64_t>(count, 1)) : sum;
  }
}

void prefix_minimum(const Segments& segments, std::size_t begin, std::size_t end, double* d) {
  double least = kInfinity;
  for (std::size_t t = begin; t < end; ++t, ++d) {
    if (!segments.used(t)) continue;
    const double own = *d;
    *d = own + (least == kInfinity ? 0.0 : least);
    least = smaller(least, own);
  }
}

}  // namespace

void scan_log_ratio(Scan scan, double pre_clip, const Column& logprob_T, const Column& anchor_T,
                    const Column& advantage_T, const Segments& segments, std::size_t first,
                    std::size_t last, double* log_ratio) {
  const std::size_t origin = static_cast<std::size_t>(segments.offset_N1[first]);
  for_blocks(origin, static_cast<std::size_t>(segments.offset_N1[last]), [&](std::size_t t, int n) {
    differences(logprob_T, anchor_T, advantage_T, pre_clip, segments, t, n,
                log_ratio + (t - origin));
  });
  for (std::size_t leaf = first; leaf < last; ++leaf) {
    const std::size_t begin = static_cast<std::size_t>(segments.offset_N1[leaf]);
    const std::size_t end = static_cast<std::size_t>(segments.offset_N1[leaf + 1]);
    double* d = log_ratio + (begin - origin);
    if (scan == Scan::min_prefix) {
      prefix_minimum(segments, begin, end, d);
    } else if (scan == Scan::seq_geo || scan == Scan::seq_prod) {
      spread_sum(scan == Scan::seq_geo, segments, begin, end, d);
    } else {
      prefix_sum(scan == Scan::cum_geo, segments, begin, end, d);
    }
  }
}

}  // namespace pyrl
