// Statistics that need a threshold on the row's logits: the nucleus, and the mass of the tokens
// near the most probable one. One block per row sweeps it repeatedly; it stays in the L2 cache.
#pragma once

#include <cfloat>

#include "logits/device_sums.cuh"

namespace pyrl::logits::device {

// Over the columns z >= floor: the sums of 2^t and t 2^t and the smallest of them; over the others:
// the largest.
struct Above {
  double sum, moment, smallest, largest_below;
};

// Merges what all threads of a block of kThreads have; every thread gets the result.
__device__ inline Above merge_block(Above above) {
  __shared__ Above of_warp[kWarps];
  above.sum = warp_sum(above.sum);
  above.moment = warp_sum(above.moment);
  above.smallest = -warp_max(-above.smallest);
  above.largest_below = warp_max(above.largest_below);
  __syncthreads();  // an earlier result may still be read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = above;
  __syncthreads();
  above = of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) {
    above.sum += of_warp[warp].sum;
    above.moment += of_warp[warp].moment;
    above.smallest = fmin(above.smallest, of_warp[warp].smallest);
    above.largest_below = fmax(above.largest_below, of_warp[warp].largest_below);
  }
  return above;
}

// Two of the sets {z >= a logit of the row}: the smallest with an amount of `enough`, and the
// largest with less, which is empty (sum 0) if the most probable tokens are enough.
struct Crossing {
  Above with, without;
};

// By bisection: both ends move to logits of the row until none is between them. above(least) is of
// the tokens z >= least; amount(above) must not fall when `least` does.
template <typename AboveAt, typename Amount>
__device__ Crossing crossing(AboveAt above, Amount amount, double enough, double maximum,
                             double scale) {
  Crossing ends = {above(-DBL_MAX), {0, 0, INFINITY, maximum}};  // masked tokens are in no set
  bool first = true;
  while (ends.with.smallest < ends.without.largest_below) {
    const double low = ends.with.smallest, high = ends.without.largest_below;
    // Tokens 60 powers of two below the maximum rarely matter; one far below must not cost steps.
    double middle = first ? high : fmax(low + (high - low) / 2, maximum - 60 / scale);
    if (!(middle > low && middle <= high)) middle = low + (high - low) / 2;
    if (!(middle > low)) middle = high;
    const Above at = above(middle);
    (amount(at) >= enough ? ends.with : ends.without) = at;
    first = false;
  }
  return ends;
}

template <typename Element>
struct ThresholdRow {
  const Element* z;
  std::int64_t vocabulary;
  Softcap softcap;
  double scale;    // log2(e) / temperature
  double maximum;  // of the row, after the soft cap

  // The sum never falls when the floor does: every floor adds the same columns in the same order.
  __attribute__((noinline)) __device__ Above above(double floor) const {
    using R = typename DeviceReal<Element>::type;
    const R shift = static_cast<R>(maximum), factor = static_cast<R>(scale);
    Above result = {0, 0, INFINITY, -INFINITY};
    R smallest = R(INFINITY), below = R(-INFINITY);
    sweep(z, 0, vocabulary, static_cast<int>(threadIdx.x),
          [&](R(&group)[kGroup<Element>], std::int64_t) {
            softcap.apply(group);
            R sum = 0, moment = 0;
#pragma unroll
            for (int i = 0; i < kGroup<Element>; ++i) {
              const bool in = static_cast<double>(group[i]) >= floor;
              const R t = larger((group[i] - shift) * factor, kLeastExponent<R>);
              const R weight = in ? base2(t) : R(0);
              sum += weight;
              moment += weight * t;
              if (in && group[i] < smallest) smallest = group[i];
              if (!in && group[i] > below) below = group[i];
            }
            result.sum += static_cast<double>(sum);
            result.moment += static_cast<double>(moment);
          });
    result.smallest = static_cast<double>(smallest);
    result.largest_below = static_cast<double>(below);
    return merge_block(result);
  }
};

}  // namespace pyrl::logits::device
