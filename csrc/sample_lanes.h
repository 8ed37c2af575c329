// The body of the sampling kernels, for the file of one instruction set to include.
#pragma once

#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "sample_kernels.h"

#define PYRL_INLINE [[gnu::always_inline]] inline
// Vectors only pass between functions that are inlined, so their calling convention is moot.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace pyrl {
namespace {

typedef float FloatLanes __attribute__((vector_size(64)));
typedef double DoubleLanes __attribute__((vector_size(64)));
typedef std::int32_t IntLanes __attribute__((vector_size(64)));
typedef std::int64_t LongLanes __attribute__((vector_size(64)));

template <typename R>
struct LanesOf {
  using type = FloatLanes;
};
template <>
struct LanesOf<double> {
  using type = DoubleLanes;
};
template <typename R>
using Lanes = typename LanesOf<R>::type;
template <typename R>
constexpr int kLanes = 64 / sizeof(R);
template <typename R>
constexpr R kInfinity = static_cast<R>(__builtin_inf());

template <typename R>
PYRL_INLINE Lanes<R> load(const R* z) {
  Lanes<R> lanes;
  std::memcpy(&lanes, z, sizeof lanes);
  return lanes;
}

template <typename R>
PYRL_INLINE Lanes<R> load_tail(const R* z, int n, R fill) {
  R padded[kLanes<R>];
  for (int i = 0; i < kLanes<R>; ++i) padded[i] = i < n ? z[i] : fill;
  return load(padded);
}

template <typename R>
PYRL_INLINE void store(R* out, const Lanes<R>& lanes) {
  std::memcpy(out, &lanes, sizeof lanes);
}

// Halves first.
template <typename R>
PYRL_INLINE double total(const Lanes<R>& lanes) {
  double part[kLanes<R>];
  for (int i = 0; i < kLanes<R>; ++i) part[i] = static_cast<double>(lanes[i]);
  for (int half = kLanes<R> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

// One bit per lane: low <= z <= high.
template <typename R>
PYRL_INLINE unsigned bits_between(const Lanes<R>& z, R low, R high) {
#ifdef __AVX512F__
  if constexpr (sizeof(R) == 4) {
    const __mmask16 at_least = _mm512_cmp_ps_mask((__m512)z, _mm512_set1_ps(low), _CMP_GE_OQ);
    return _mm512_mask_cmp_ps_mask(at_least, (__m512)z, _mm512_set1_ps(high), _CMP_LE_OQ);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(R) == 4) {
    unsigned bits = 0;
    for (int half = 0; half < 2; ++half) {
      __m256 part;
      std::memcpy(&part, reinterpret_cast<const char*>(&z) + 32 * half, sizeof part);
      const __m256 at_least = _mm256_cmp_ps(part, _mm256_set1_ps(low), _CMP_GE_OQ);
      const __m256 at_most = _mm256_cmp_ps(part, _mm256_set1_ps(high), _CMP_LE_OQ);
      bits |= static_cast<unsigned>(_mm256_movemask_ps(_mm256_and_ps(at_least, at_most)))
              << (8 * half);
    }
    return bits;
  }
#endif
  unsigned bits = 0;
  for (int i = 0; i < kLanes<R>; ++i)
    bits |= static_cast<unsigned>(z[i] >= low && z[i] <= high) << i;
  return bits;
}

// Moves the lanes whose bit is set to the front.
template <typename R>
PYRL_INLINE void store_packed(R* out, const Lanes<R>& lanes, unsigned bits) {
#ifdef __AVX512F__
  if constexpr (sizeof(R) == 4) {
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), (__m512)lanes));
    return;
  }
#endif
  for (; bits != 0; bits &= bits - 1) *out++ = lanes[__builtin_ctz(bits)];
}

// 2^t for t in [-127, 126]: minimax polynomial of degree 6 on [-1/2, 1/2], relative error 2e-9
// before rounding, 2^0 = 1 exactly; 0 for t = -127. Adding 1.5 * 2^23 leaves the integer part in
// the low bits.
PYRL_INLINE FloatLanes exp2_lanes(const FloatLanes& t) {
  constexpr float kRound = 12582912.0f;
  const FloatLanes rounded = t + kRound;
  const FloatLanes r = t - (rounded - kRound);
  FloatLanes p = r * 1.5345812e-4f + 1.33999312e-3f;
  p = p * r + 9.61848896e-3f;
  p = p * r + 5.55032878e-2f;
  p = p * r + 2.40226469e-1f;
  p = p * r + 6.93147206e-1f;
  p = p * r + 1.0f;
  return (FloatLanes)((IntLanes)p + ((IntLanes)rounded << 23));
}

PYRL_INLINE DoubleLanes exp2_lanes(const DoubleLanes& t) {
  DoubleLanes p;
  for (int i = 0; i < 8; ++i) p[i] = t[i] > kLowestExponent ? __builtin_exp2(t[i]) : 0.0;
  return p;
}

// Clamping before the exponential keeps 0 * inf out of the moment.
template <typename R>
PYRL_INLINE Lanes<R> exponent(const Lanes<R>& z, R maximum, R scale) {
  const Lanes<R> t = (z - maximum) * scale;
  const Lanes<R> lowest = Lanes<R>{} + static_cast<R>(kLowestExponent);
  return t < lowest ? lowest : t;
}

template <typename R>
R block_maximum(const R* z, int n) {
  constexpr int kStep = 4 * kLanes<R>;
  Lanes<R> maximum[4];
  for (Lanes<R>& lanes : maximum) lanes = Lanes<R>{} - kInfinity<R>;
  const auto visit = [&](Lanes<R>& m, const Lanes<R>& lanes)
                         __attribute__((always_inline)) { m = m < lanes ? lanes : m; };
  int i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int j = 0; j < 4; ++j) visit(maximum[j], load(z + i + j * kLanes<R>));
  }
  for (; i + kLanes<R> <= n; i += kLanes<R>) visit(maximum[0], load(z + i));
  if (i < n) visit(maximum[0], load_tail(z + i, n - i, -kInfinity<R>));
  for (int j = 1; j < 4; ++j) visit(maximum[0], maximum[j]);
  R result = -kInfinity<R>;
  for (int lane = 0; lane < kLanes<R>; ++lane) {
    if (maximum[0][lane] > result) result = maximum[0][lane];
  }
  return result;
}

template <typename R>
SampleSums block_sums(const R* z, int n, R maximum, R scale) {
  Lanes<R> sum{}, moment{};
  const auto visit = [&](const Lanes<R>& lanes) __attribute__((always_inline)) {
    const Lanes<R> t = exponent(lanes, maximum, scale);
    const Lanes<R> weight = exp2_lanes(t);
    sum += weight;
    moment += weight * t;
  };
  int i = 0;
  for (; i + kLanes<R> <= n; i += kLanes<R>) {
    __builtin_prefetch(z + i + kSampleBlock);
    visit(load(z + i));
  }
  if (i < n) visit(load_tail(z + i, n - i, -kInfinity<R>));
  return {total<R>(sum), total<R>(moment)};
}

template <typename R>
void block_top(const R* z, int n, R* top) {
  const auto visit = [&](const Lanes<R>& lanes) __attribute__((always_inline)) {
    const R least = top[kSampleTop - 1];
    for (unsigned bits = bits_between(lanes, least, kInfinity<R>); bits != 0; bits &= bits - 1) {
      const R value = lanes[__builtin_ctz(bits)];
      int place = kSampleTop - 1;
      if (value <= top[place]) continue;
      for (; place > 0 && top[place - 1] < value; --place) top[place] = top[place - 1];
      top[place] = value;
    }
  };
  int i = 0;
  for (; i + kLanes<R> <= n; i += kLanes<R>) visit(load(z + i));
  if (i < n) visit(load_tail(z + i, n - i, -kInfinity<R>));
}

template <typename R>
void block_weights(const R* z, R* weight, int n, R maximum, R scale) {
  int i = 0;
  for (; i + kLanes<R> <= n; i += kLanes<R>) {
    store(weight + i, exp2_lanes(exponent(load(z + i), maximum, scale)));
  }
  if (i == n) return;
  const Lanes<R> tail = load_tail(z + i, n - i, -kInfinity<R>);
  const Lanes<R> lanes = exp2_lanes(exponent(tail, maximum, scale));
  for (int lane = 0; i < n; ++i, ++lane) weight[i] = lanes[lane];
}

template <typename R>
Above<R> row_above(const R* z, const R* weight, int n, R floor) {
  Lanes<R> mass{}, least = Lanes<R>{} + kInfinity<R>, below = Lanes<R>{} - kInfinity<R>;
  auto count = mass < mass;
  const auto visit = [&](const Lanes<R>& lanes, const Lanes<R>& w) __attribute__((always_inline)) {
    const auto inside = lanes >= floor;
    mass += inside ? w : Lanes<R>{};
    count -= inside;
    const Lanes<R> in = inside ? lanes : Lanes<R>{} + kInfinity<R>;
    const Lanes<R> out = inside ? Lanes<R>{} - kInfinity<R> : lanes;
    least = in < least ? in : least;
    below = out > below ? out : below;
  };
  int i = 0;
  for (; i + kLanes<R> <= n; i += kLanes<R>) visit(load(z + i), load(weight + i));
  if (i < n) visit(load_tail(z + i, n - i, -kInfinity<R>), load_tail(weight + i, n - i, R{0}));
  Above<R> result;
  result.mass = total<R>(mass);
  for (int lane = 0; lane < kLanes<R>; ++lane) {
    result.count += count[lane];
    if (least[lane] < result.least) result.least = least[lane];
    if (below[lane] > result.below) result.below = below[lane];
  }
  return result;
}

template <typename R>
int row_between(const R* z, const R* weight, int n, R low, R high, R* z_out, R* weight_out) {
  int found = 0;
  const auto visit = [&](const Lanes<R>& lanes, const Lanes<R>& w) __attribute__((always_inline)) {
    const unsigned bits = bits_between(lanes, low, high);
    store_packed(z_out + found, lanes, bits);
    store_packed(weight_out + found, w, bits);
    found += __builtin_popcount(bits);
  };
  int i = 0;
  for (; i + kLanes<R> <= n; i += kLanes<R>) visit(load(z + i), load(weight + i));
  if (i < n) {
    const R outside = static_cast<R>(__builtin_nan(""));
    visit(load_tail(z + i, n - i, outside), load_tail(weight + i, n - i, R{0}));
  }
  return found;
}

template <typename R>
int find_one_by_one(const R* weight, int begin, int end, double target) {
  double cumulative = 0;
  int last = begin;
  for (int i = begin; i < end; ++i) {
    if (weight[i] == 0) continue;
    last = i;
    cumulative += static_cast<double>(weight[i]);
    if (cumulative > target) break;
  }
  return last;
}

// Groups of 8 vectors are passed over by their sum.
template <typename R>
int block_find(const R* weight, int n, double target) {
  constexpr int kGroup = 8 * kLanes<R>;
  int begin = 0;
  for (; begin + kGroup < n; begin += kGroup) {
    Lanes<R> sum{};
    for (int i = 0; i < kGroup; i += kLanes<R>) sum += load(weight + begin + i);
    const double mass = total<R>(sum);
    if (target < mass) break;
    target -= mass;
  }
  const int end = begin + kGroup < n ? begin + kGroup : n;
  const int found = find_one_by_one(weight, begin, end, target);
  return weight[found] > 0 ? found : find_one_by_one(weight, 0, n, __builtin_inf());
}

template <typename R>
constexpr SampleKernels<R> kKernels{&block_maximum<R>, &block_sums<R>, &block_top<R>,
                                    &block_weights<R>, &row_above<R>,  &row_between<R>,
                                    &block_find<R>};

}  // namespace
}  // namespace pyrl
