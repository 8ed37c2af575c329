// The body of the sampling kernels, for the file of one instruction set to include. It takes 16
// lanes (float64: 8) at a time, in one vector or several, so that every file sums in the same
// order.
#pragma once

#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "logits/sample/kernels.h"

// Vectors only pass between functions that are inlined, so their calling convention is moot.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace pyrl::logits::sample {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kVectors = 64 / kBytes;
template <typename R>
constexpr int kWidth = kBytes / sizeof(R);
template <typename R>
constexpr int kLanes = 64 / sizeof(R);
template <typename R>
constexpr R kInfinity = static_cast<R>(__builtin_inf());

template <typename R>
struct VectorOf {
  typedef R type __attribute__((vector_size(kBytes)));
};
template <typename R>
using Vector = typename VectorOf<R>::type;
using Ints = Vector<std::int32_t>;

template <typename R>
PYRL_INLINE Vector<R> all(R x) {
  return Vector<R>{} + x;
}

template <typename R>
PYRL_INLINE Vector<R> load(const R* z) {
  Vector<R> vector;
  std::memcpy(&vector, z, sizeof vector);
  return vector;
}

template <typename R>
PYRL_INLINE void store(R* out, const Vector<R>& vector) {
  std::memcpy(out, &vector, sizeof vector);
}

// The last elements of an array, filled up.
template <typename R>
struct Tail {
  R padded[kLanes<R>];

  PYRL_INLINE Tail(const R* z, int n, R fill) {
    for (int i = 0; i < kLanes<R>; ++i) padded[i] = i < n ? z[i] : fill;
  }
};

// Calls visit(v, z) for each vector z of the array, v = 0..kVectors - 1 in turn; -inf fills the
// end.
template <typename R, typename Visit>
PYRL_INLINE void each_vector(const R* z, int n, Visit&& visit) {
  int i = 0;
  for (; i + kLanes<R> <= n; i += kLanes<R>) {
    for (int v = 0; v < kVectors; ++v) visit(v, load(z + i + v * kWidth<R>));
  }
  if (i == n) return;
  const Tail<R> tail(z + i, n - i, -kInfinity<R>);
  for (int v = 0; v < kVectors; ++v) visit(v, load(tail.padded + v * kWidth<R>));
}

// The same over two arrays; NaN and 0 fill the end.
template <typename R, typename Visit>
PYRL_INLINE void each_pair(const R* z, const R* weight, int n, Visit&& visit) {
  int i = 0;
  for (; i + kLanes<R> <= n; i += kLanes<R>) {
    for (int v = 0; v < kVectors; ++v) {
      visit(v, load(z + i + v * kWidth<R>), load(weight + i + v * kWidth<R>));
    }
  }
  if (i == n) return;
  const Tail<R> z_tail(z + i, n - i, static_cast<R>(__builtin_nan("")));
  const Tail<R> weight_tail(weight + i, n - i, R{0});
  for (int v = 0; v < kVectors; ++v) {
    visit(v, load(z_tail.padded + v * kWidth<R>), load(weight_tail.padded + v * kWidth<R>));
  }
}

// Halves first.
template <typename R>
PYRL_INLINE double total(const Vector<R>* vectors) {
  double lane[kLanes<R>];
  for (int i = 0; i < kLanes<R>; ++i) {
    lane[i] = static_cast<double>(vectors[i / kWidth<R>][i % kWidth<R>]);
  }
  for (int half = kLanes<R> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// One bit per lane: low <= z <= high.
template <typename R>
PYRL_INLINE unsigned bits_between(const Vector<R>& z, R low, R high) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == sizeof(float)) {
    const __mmask16 at_least = _mm512_cmp_ps_mask(z, _mm512_set1_ps(low), _CMP_GE_OQ);
    return _mm512_mask_cmp_ps_mask(at_least, z, _mm512_set1_ps(high), _CMP_LE_OQ);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(R) == sizeof(float)) {
    const __m256 at_least = _mm256_cmp_ps(z, _mm256_set1_ps(low), _CMP_GE_OQ);
    const __m256 at_most = _mm256_cmp_ps(z, _mm256_set1_ps(high), _CMP_LE_OQ);
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_and_ps(at_least, at_most)));
  }
#endif
  unsigned bits = 0;
  for (int i = 0; i < kWidth<R>; ++i) {
    bits |= static_cast<unsigned>(z[i] >= low && z[i] <= high) << i;
  }
  return bits;
}

// Moves the lanes whose bit is set to the front.
template <typename R>
PYRL_INLINE void store_packed(R* out, const Vector<R>& vector, unsigned bits) {
#ifdef __AVX512F__
  if constexpr (sizeof(R) == sizeof(float)) {
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), vector));
    return;
  }
#endif
  for (; bits != 0; bits &= bits - 1) *out++ = vector[__builtin_ctz(bits)];
}

// 2^t for t in [-127, 126]: minimax polynomial of degree 6 on [-1/2, 1/2], relative error 2e-9
// before rounding, 2^0 = 1 exactly; 0 for t = -127. Adding 1.5 * 2^23 leaves the integer part in
// the low bits.
PYRL_INLINE Vector<float> exp2_lanes(const Vector<float>& t) {
  constexpr float kRound = 12582912.0f;
  const Vector<float> rounded = t + kRound;
  const Vector<float> r = t - (rounded - kRound);
  Vector<float> p = r * 1.5345812e-4f + 1.33999312e-3f;
  p = p * r + 9.61848896e-3f;
  p = p * r + 5.55032878e-2f;
  p = p * r + 2.40226469e-1f;
  p = p * r + 6.93147206e-1f;
  p = p * r + 1.0f;
  return (Vector<float>)((Ints)p + ((Ints)rounded << 23));
}

PYRL_INLINE Vector<double> exp2_lanes(const Vector<double>& t) {
  Vector<double> p;
  for (int i = 0; i < kWidth<double>; ++i) {
    p[i] = t[i] > kLowestExponent ? __builtin_exp2(t[i]) : 0.0;
  }
  return p;
}

// Clamping before the exponential keeps 0 * inf out of the moment.
template <typename R>
PYRL_INLINE Vector<R> exponent(const Vector<R>& z, R maximum, R scale) {
  const Vector<R> t = (z - maximum) * scale;
  const Vector<R> lowest = all(static_cast<R>(kLowestExponent));
  return t < lowest ? lowest : t;
}

template <typename R>
R block_maximum(const R* z, int n) {
  // Several at a time: each waits for its own last result.
  constexpr int kChains = 4 * kLanes<R>;
  Vector<R> maximum[4 * kVectors];
  for (Vector<R>& vector : maximum) vector = all(-kInfinity<R>);
  int i = 0;
  for (; i + kChains <= n; i += kChains) {
    for (int v = 0; v < 4 * kVectors; ++v) {
      const Vector<R> vector = load(z + i + v * kWidth<R>);
      maximum[v] = maximum[v] < vector ? vector : maximum[v];
    }
  }
  each_vector(z + i, n - i, [&](int v, const Vector<R>& vector) __attribute__((always_inline)) {
    maximum[v] = maximum[v] < vector ? vector : maximum[v];
  });
  R result = -kInfinity<R>;
  for (const Vector<R>& vector : maximum) {
    for (int lane = 0; lane < kWidth<R>; ++lane) {
      if (vector[lane] > result) result = vector[lane];
    }
  }
  return result;
}

template <typename R>
SampleSums block_sums(const R* z, int n, R maximum, R scale, const char* ahead) {
  Vector<R> sum[kVectors]{}, moment[kVectors]{};
  each_vector(z, n, [&](int v, const Vector<R>& vector) __attribute__((always_inline)) {
    if (v == 0) __builtin_prefetch(ahead, 0, 2);
    ahead += kBytes;
    const Vector<R> t = exponent(vector, maximum, scale);
    const Vector<R> weight = exp2_lanes(t);
    sum[v] += weight;
    moment[v] += weight * t;
  });
  return {total<R>(sum), total<R>(moment)};
}

template <typename R>
void block_top(const R* z, int n, R* top) {
  each_vector(z, n, [&](int, const Vector<R>& vector) __attribute__((always_inline)) {
    unsigned bits = bits_between(vector, top[kSampleTop - 1], kInfinity<R>);
    for (; bits != 0; bits &= bits - 1) {
      const R value = vector[__builtin_ctz(bits)];
      int place = kSampleTop - 1;
      if (value <= top[place]) continue;
      for (; place > 0 && top[place - 1] < value; --place) top[place] = top[place - 1];
      top[place] = value;
    }
  });
}

template <typename R>
void block_weights(const R* z, R* weight, int n, R maximum, R scale) {
  int i = 0;
  for (; i + kWidth<R> <= n; i += kWidth<R>) {
    store(weight + i, exp2_lanes(exponent(load(z + i), maximum, scale)));
  }
  if (i == n) return;
  const Tail<R> tail(z + i, n - i, -kInfinity<R>);
  const Vector<R> vector = exp2_lanes(exponent(load(tail.padded), maximum, scale));
  for (int lane = 0; i < n; ++i, ++lane) weight[i] = vector[lane];
}

template <bool kMoment, typename R>
PYRL_INLINE Above<R> sum_above(const R* z, const R* weight, int n, R floor, R maximum, R scale) {
  Vector<R> mass[kVectors]{}, moment[kVectors]{}, least[kVectors], below[kVectors];
  for (Vector<R>& vector : least) vector = all(kInfinity<R>);
  for (Vector<R>& vector : below) vector = all(-kInfinity<R>);
  decltype(mass[0] < mass[0]) count{};
  each_pair(z, weight, n,
            [&](int v, const Vector<R>& vector, const Vector<R>& w) __attribute__((always_inline)) {
              const auto inside = vector >= floor;
              mass[v] += inside ? w : Vector<R>{};
              if constexpr (kMoment) {
                moment[v] += inside ? w * exponent(vector, maximum, scale) : Vector<R>{};
              }
              count -= inside;
              const Vector<R> in = inside ? vector : all(kInfinity<R>);
              const Vector<R> out = inside ? all(-kInfinity<R>) : vector;
              least[v] = in < least[v] ? in : least[v];
              below[v] = out > below[v] ? out : below[v];
            });
  Above<R> result;
  result.mass = total<R>(mass);
  if constexpr (kMoment) result.moment = total<R>(moment);
  for (int lane = 0; lane < kWidth<R>; ++lane) {
    result.count += count[lane];
    for (int v = 0; v < kVectors; ++v) {
      if (least[v][lane] < result.least) result.least = least[v][lane];
      if (below[v][lane] > result.below) result.below = below[v][lane];
    }
  }
  return result;
}

template <typename R>
Above<R> row_above(const R* z, const R* weight, int n, R floor) {
  return sum_above<false>(z, weight, n, floor, R{}, R{});
}

template <typename R>
Above<R> row_above_moment(const R* z, const R* weight, int n, R floor, R maximum, R scale) {
  return sum_above<true>(z, weight, n, floor, maximum, scale);
}

template <typename R>
int row_between(const R* z, const R* weight, int n, R low, R high, R* z_out, R* weight_out) {
  int found = 0;
  each_pair(z, weight, n,
            [&](int, const Vector<R>& vector, const Vector<R>& w) __attribute__((always_inline)) {
              const unsigned bits = bits_between(vector, low, high);
              store_packed(z_out + found, vector, bits);
              store_packed(weight_out + found, w, bits);
              found += __builtin_popcount(bits);
            });
  return found;
}

template <typename R>
double block_mass(const R* z, const R* weight, int n, R floor) {
  // Several sums at a time: each waits for its own last result.
  constexpr int kChains = 4 * kLanes<R>;
  Vector<R> sum[4 * kVectors]{};
  int i = 0;
  for (; i + kChains <= n; i += kChains) {
    for (int v = 0; v < 4 * kVectors; ++v) {
      const Vector<R> w = load(weight + i + v * kWidth<R>);
      sum[v] += load(z + i + v * kWidth<R>) >= floor ? w : Vector<R>{};
    }
  }
  each_pair(z + i, weight + i, n - i,
            [&](int v, const Vector<R>& vector, const Vector<R>& w)
                __attribute__((always_inline)) { sum[v] += vector >= floor ? w : Vector<R>{}; });
  double mass = 0;
  for (int chain = 0; chain < 4; ++chain) mass += total<R>(sum + chain * kVectors);
  return mass;
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

// Groups of 128 (float64: 64) elements are passed over by their sum.
template <typename R>
int block_find(const R* weight, int n, double target) {
  constexpr int kGroup = 8 * kLanes<R>;
  int begin = 0;
  for (; begin + kGroup < n; begin += kGroup) {
    Vector<R> sum[kVectors]{};
    each_vector(weight + begin, kGroup,
                [&](int v, const Vector<R>& w) __attribute__((always_inline)) { sum[v] += w; });
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
                                    &block_weights<R>, &row_above<R>,  &row_above_moment<R>,
                                    &row_between<R>,   &block_mass<R>, &block_find<R>};

}  // namespace
}  // namespace pyrl::logits::sample
