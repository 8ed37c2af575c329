// What a token of a response takes from those before it: one block of threads per response, 256
// tokens at a time, each with what lies before it. The order of additions is a function of the
// token's place in its response alone.
#pragma once

#include "base/device.cuh"
#include "loss/policy_loss.h"

namespace pyrl::loss::device {

using namespace pyrl::device;

// Sums over tokens that take part, with d as in scan.h.
struct Prefix {
  double sum;  // of d
  double least;
  std::int64_t count;
};

__device__ inline Prefix combine(const Prefix& a, const Prefix& b) {
  return {a.sum + b.sum, smaller(a.least, b.least), a.count + b.count};
}

// The prefix of the lane that is `lanes` before this one; without one, this lane's.
__device__ inline Prefix from_before(const Prefix& own, unsigned lanes) {
  return {__shfl_up_sync(kAllLanes, own.sum, lanes), __shfl_up_sync(kAllLanes, own.least, lanes),
          __shfl_up_sync(kAllLanes, own.count, lanes)};
}

// What lies before each thread's own, all of them called together; `carry` becomes what lies before
// the next call's.
__device__ inline Prefix before_own(const Prefix& own, Prefix& carry) {
  __shared__ Prefix of_warp[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  Prefix until = own;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const Prefix earlier = from_before(until, static_cast<unsigned>(lanes));
    if (lane >= lanes) until = combine(earlier, until);
  }
  const Prefix in_warp = from_before(until, 1);
  if (lane == kWarp - 1) of_warp[warp] = until;
  __syncthreads();
  Prefix before = carry;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = carry;
    carry = combine(carry, of_warp[w]);
  }
  __syncthreads();  // of_warp is written again
  return lane == 0 ? before : combine(before, in_warp);
}

__device__ inline Prefix token_prefix(const PolicyLossArgs& args, std::int64_t t) {
  if (!args.responses.used(static_cast<std::size_t>(t))) return {0, kInfinity, 0};
  if (args.scan == Scan::none) return {0, kInfinity, 1};
  const auto at = [&](TokenColumn name) {
    return args.column[static_cast<int>(name)][static_cast<std::size_t>(t)];
  };
  double d = at(TokenColumn::logprob) - at(TokenColumn::anchor);
  if (args.spec.pre_clip < kInfinity) {
    d = pre_clipped(d, at(TokenColumn::advantage), args.spec.pre_clip);
  }
  const double least = smaller(kInfinity, d);  // without NaN
  const bool cumulative = args.scan == Scan::cum_prod || args.scan == Scan::cum_geo;
  return {cumulative ? clamped(d, -kLogRatioLimit, kLogRatioLimit) : d, least, 1};
}

// log R of a scan along the response up to the token; outside the mask any number, also NaN.
__device__ inline double scanned(Scan scan, const Prefix& before, const Prefix& own) {
  const double sum = before.sum + own.sum;
  if (scan == Scan::cum_prod) return sum;
  if (scan == Scan::cum_geo) return sum / static_cast<double>(before.count + own.count);
  return own.sum + (before.least == kInfinity ? 0.0 : before.least);  // min_prefix
}

// Each is written where it is not null: log R, and how many tokens that take part lie before.
__global__ void __launch_bounds__(kThreads)
    response_kernel(PolicyLossArgs args, double* log_ratio_T, std::int64_t* position_T) {
  const std::int64_t* offset_N1 = args.responses.offset_N1;
  const std::int64_t begin = offset_N1[blockIdx.x], end = offset_N1[blockIdx.x + 1];
  const bool whole = args.scan == Scan::seq_geo || args.scan == Scan::seq_prod;
  Prefix carry = {0, kInfinity, 0};
  for (std::int64_t tile = begin; tile < end; tile += kThreads) {
    const std::int64_t t = tile + threadIdx.x;
    const Prefix own = t < end ? token_prefix(args, t) : Prefix{0, kInfinity, 0};
    const Prefix before = before_own(own, carry);
    if (t >= end) continue;
    if (position_T != nullptr) position_T[t] = before.count;
    if (log_ratio_T != nullptr && !whole) log_ratio_T[t] = scanned(args.scan, before, own);
  }
  if (log_ratio_T == nullptr || !whole) return;
  const std::int64_t count = args.scan == Scan::seq_geo ? carry.count : 1;
  const double of_all = carry.sum / static_cast<double>(count);
  for (std::int64_t t = begin + threadIdx.x; t < end; t += kThreads) log_ratio_T[t] = of_all;
}

}  // namespace pyrl::loss::device
