// The sums over a row of logits from which its statistics follow: online in each thread, then
// relative to the common maximum of a warp, a part and the row, always added in the same order.
#pragma once

#include "logits/device_row.cuh"

namespace pyrl::logits::device {

inline constexpr int kMostTop = 8;
inline constexpr double kLn2 = 0.693147180559945309417;
inline constexpr double kLog2E = 1.44269504088896340736;

// Columns that a team adds up before sums are merged. Fixed: whether one block takes a row's parts
// or many do, the bits are the same.
inline constexpr std::int64_t kPart = 1 << 15;

__host__ __device__ inline std::int64_t parts_of(std::int64_t vocabulary) {
  return (vocabulary + kPart - 1) / kPart;
}

__device__ inline std::int64_t part_end(std::int64_t begin, std::int64_t vocabulary) {
  return begin + kPart < vocabulary ? begin + kPart : vocabulary;
}

inline constexpr int kMostParts = 40;  // whose sums fit the static shared memory of one block

inline void check_columns(const std::string& function, std::int64_t vocabulary) {
  if (parts_of(vocabulary) <= kMostParts) return;
  throw std::invalid_argument(function + ": on a CUDA device expected at most " +
                              std::to_string(kMostParts * kPart) + " columns, got " +
                              std::to_string(vocabulary));
}

// For t_j = (z_j - maximum) log2(e) / temperature. NaN and +inf in z make `sum` NaN.
struct PartSums {
  double maximum;
  double sum;         // of 2^t
  double moment;      // of t 2^t
  double second;      // of 2^(t temperature / second_temperature)
  double squares;     // of 4^t
  double squares_at;  // of t 4^t
  double logits;      // of z
  double top[kMostTop];
};

struct Wanted {
  double scale;   // log2(e) / temperature
  double second;  // temperature / second_temperature; 0: not wanted
  bool squares, logits;
  int top;  // how many of the largest elements
};

// z -> limit tanh(z / limit); a masked token stays masked and +inf stays invalid. 0: z itself.
struct Softcap {
  double limit;

  template <typename R, int kSize>
  __device__ void apply(R (&z)[kSize]) const {
    if (limit == 0) return;
#pragma unroll
    for (int i = 0; i < kSize; ++i) z[i] = of(z[i]);
  }

  template <typename R>
  __device__ R of(R z) const {
    const R cap = static_cast<R>(limit);
    return limit == 0 || isinf(z) ? z : cap * hyperbolic_tangent(z / cap);
  }

  // d of(z) / dz from the value of(z); 0 for a masked token
  template <typename R>
  __device__ R slope(R capped) const {
    if (limit == 0) return R(1);
    const R share = capped / static_cast<R>(limit);
    return isinf(capped) ? R(0) : 1 - share * share;
  }
};

__device__ inline PartSums no_sums() {
  PartSums sums = {-INFINITY, 0, 0, 0, 0, 0, 0, {}};
  for (int k = 0; k < kMostTop; ++k) sums.top[k] = -INFINITY;
  return sums;
}

// Keeps top descending.
template <typename R>
__device__ void insert_top(R z, R* top) {
  if (!(z > top[kMostTop - 1])) return;
  top[kMostTop - 1] = z;
#pragma unroll
  for (int k = kMostTop - 1; k > 0; --k) {
    const R above = top[k - 1], below = top[k];
    top[k - 1] = below > above ? below : above;
    top[k] = below > above ? above : below;
  }
}

// Expresses the sums relative to a maximum that is not smaller. NaN in `sum` stays.
__device__ inline void raise_maximum(PartSums& sums, double maximum, const Wanted& wanted) {
  if (sums.maximum == maximum) return;
  const double distance = (sums.maximum - maximum) * wanted.scale;
  const double factor = exp2(distance);
  sums.maximum = maximum;
  if (factor == 0) {
    sums.moment = sums.squares = sums.squares_at = 0;
    sums.sum *= 0;
  } else {
    sums.moment = (sums.moment + sums.sum * distance) * factor;
    sums.sum *= factor;
    sums.squares_at = (sums.squares_at + sums.squares * distance) * factor * factor;
    sums.squares *= factor * factor;
  }
  if (wanted.second != 0) sums.second *= exp2(distance * wanted.second);
}

// The sums of warps or of parts as one, added in their order.
__device__ inline PartSums combine(const PartSums* list, std::int64_t count, const Wanted& wanted) {
  PartSums all = no_sums();
  for (std::int64_t i = 0; i < count; ++i) all.maximum = fmax(all.maximum, list[i].maximum);
  for (std::int64_t i = 0; i < count; ++i) {
    PartSums sums = list[i];
    raise_maximum(sums, all.maximum, wanted);
    all.sum += sums.sum;
    all.moment += sums.moment;
    all.second += sums.second;
    all.squares += sums.squares;
    all.squares_at += sums.squares_at;
    all.logits += sums.logits;
    if (wanted.top == 0) continue;
#pragma unroll
    for (int k = 0; k < kMostTop; ++k) insert_top(sums.top[k], all.top);
  }
  return all;
}

// Adds differences to the maximum so far: a sum of the logits would round a common offset away.
template <typename Element, typename R>
__device__ void add_logits(const R* z, std::int64_t columns, PartSums& sums) {
  const R shift = sums.maximum == -INFINITY ? R(0) : static_cast<R>(sums.maximum);
  R differences = 0;
  int count = 0;
#pragma unroll
  for (int i = 0; i < kGroup<Element>; ++i) {
    if (column_in_group<Element>(i) < columns) {
      differences += z[i] - shift;
      ++count;
    }
  }
  sums.logits += static_cast<double>(differences) + count * static_cast<double>(shift);
}

// Adds a group of columns: its sums in the type of the logits, then onto the thread's in double.
// kAll: all that is wanted, otherwise `sum` and `moment` alone.
template <typename Element, bool kAll, typename R>
__device__ void add_group(const R* z, std::int64_t columns, const Wanted& wanted, PartSums& sums,
                          R* top) {
  constexpr int kSize = kGroup<Element>;
  R maximum = z[0];
  bool valid = true;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    maximum = larger(maximum, z[i]);
    valid = valid && z[i] < R(INFINITY);
  }
  if (!valid) sums.sum = NAN;
  if (static_cast<double>(maximum) > sums.maximum) {
    if (sums.sum != 0) raise_maximum(sums, static_cast<double>(maximum), wanted);
    sums.maximum = static_cast<double>(maximum);
  }
  if constexpr (kAll) {
    if (wanted.logits) add_logits<Element>(z, columns, sums);
    if (wanted.top > 0 && maximum > top[kMostTop - 1]) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) insert_top(z[i], top);
    }
  }
  if (sums.maximum == -INFINITY) return;
  const R shift = static_cast<R>(sums.maximum), scale = static_cast<R>(wanted.scale);
  R sum = 0, moment = 0, second = 0, squares = 0, squares_at = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const R exponent = (z[i] - shift) * scale;
    const R t = larger(exponent, kLeastExponent<R>);
    const R weight = base2(t);
    sum += weight;
    moment += weight * t;
    if constexpr (kAll) {
      if (wanted.squares) {
        squares += weight * weight;
        squares_at += weight * weight * t;
      }
      if (wanted.second != 0) {
        second += base2(larger(exponent * static_cast<R>(wanted.second), kLeastExponent<R>));
      }
    }
  }
  sums.sum += static_cast<double>(sum);
  sums.moment += static_cast<double>(moment);
  if constexpr (kAll) {
    sums.second += static_cast<double>(second);
    sums.squares += static_cast<double>(squares);
    sums.squares_at += static_cast<double>(squares_at);
  }
}

// The warp's largest elements, into sums.top; of equal ones the lowest lane gives its own.
template <typename R>
__device__ void merge_top(R* top, int count, PartSums& sums) {
  const int own = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int k = 0; k < kMostTop; ++k) {
    if (k >= count) break;
    R value = top[0];
    int lane = own;
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const R other = __shfl_xor_sync(kAllLanes, value, lanes);
      const int from = __shfl_xor_sync(kAllLanes, lane, lanes);
      if (other > value || (other == value && from < lane)) {
        value = other;
        lane = from;
      }
    }
    sums.top[k] = static_cast<double>(value);
    if (lane != own) continue;
#pragma unroll
    for (int i = 0; i + 1 < kMostTop; ++i) top[i] = top[i + 1];
    top[kMostTop - 1] = R(-INFINITY);
  }
}

// The sums of the columns begin <= column < end that the warp's threads take; every lane of it
// calls this and has the result.
template <typename Element, bool kAll>
__device__ PartSums warp_sums(const Element* row, std::int64_t begin, std::int64_t end, int thread,
                              const Softcap& softcap, const Wanted& wanted) {
  using R = typename DeviceReal<Element>::type;
  PartSums sums = no_sums();
  R top[kMostTop];
#pragma unroll
  for (int k = 0; k < kMostTop; ++k) top[k] = R(-INFINITY);
  sweep(row, begin, end, thread, [&](R(&z)[kGroup<Element>], std::int64_t first) {
    softcap.apply(z);
    add_group<Element, kAll>(z, end - first, wanted, sums, top);
  });
  raise_maximum(sums, warp_max(sums.maximum), wanted);
  sums.sum = warp_sum(sums.sum);
  sums.moment = warp_sum(sums.moment);
  if constexpr (kAll) {
    sums.second = warp_sum(sums.second);
    sums.squares = warp_sum(sums.squares);
    sums.squares_at = warp_sum(sums.squares_at);
    sums.logits = warp_sum(sums.logits);
    merge_top(top, wanted.top, sums);
  }
  return sums;
}

}  // namespace pyrl::logits::device
