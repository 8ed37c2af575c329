#include <immintrin.h>

#include "logits/stats/body.h"

namespace pyrl::logits::stats {
namespace {

// Eight floats; a mask is a vector of all or no bits.
struct Avx2 {
  using Vector = __m256;
  using Mask = __m256;
  using Scalar = float;
  static constexpr int kWidth = 8;
  static constexpr float kSmallest = -126;  // of the exponents that the addition of bits can make
  static constexpr bool kClamps = true;

  static PYRL_INLINE Vector all(float x) { return _mm256_set1_ps(x); }
  static PYRL_INLINE __m256i ints(int x) { return _mm256_set1_epi32(x); }
  static PYRL_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(ints(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static PYRL_INLINE Vector head(Vector v, int n) {
    return _mm256_and_ps(_mm256_castsi256_ps(first(n)), v);
  }

  static PYRL_INLINE Vector load(const float* z) { return _mm256_loadu_ps(z); }
  static PYRL_INLINE Vector load(const float* z, int n) {
    const __m256i kept = first(n);
    return choose(_mm256_castsi256_ps(kept), _mm256_maskload_ps(z, kept), all(-__builtin_inff()));
  }
  static PYRL_INLINE Vector widen(const Float16*, __m128i bits) { return _mm256_cvtph_ps(bits); }
  static PYRL_INLINE Vector widen(const BFloat16*, __m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  template <typename Half>
  static PYRL_INLINE Vector load(const Half* z) {
    return widen(z, _mm_loadu_si128(reinterpret_cast<const __m128i*>(z)));
  }
  template <typename Half>
  static PYRL_INLINE Vector load(const Half* z, int n) {
    Half padded[kWidth] = {};
    for (int i = 0; i < n; ++i) padded[i] = z[i];
    return choose(_mm256_castsi256_ps(first(n)), load(padded), all(-__builtin_inff()));
  }

  static PYRL_INLINE void store(Vector v, float* out) { _mm256_storeu_ps(out, v); }
  static PYRL_INLINE void store(Vector v, float* out, int n) {
    _mm256_maskstore_ps(out, first(n), v);
  }
  static PYRL_INLINE __m128i narrow(Vector v, const Float16*) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // To nearest even; NaN becomes quiet; what is subnormal becomes a zero.
  static PYRL_INLINE __m128i narrow(Vector v, const BFloat16*) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), ints(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, ints(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, ints(0x400000)), nan);
    const __m256i tiny = _mm256_cmpeq_epi32(_mm256_and_si256(bits, ints(0x7f800000)), ints(0));
    const __m256i sign = _mm256_and_si256(bits, ints(static_cast<int>(0x80000000u)));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, sign, tiny), 16);
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
  }
  template <typename Half>
  static PYRL_INLINE void store(Vector v, Half* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), narrow(v, out));
  }
  template <typename Half>
  static PYRL_INLINE void store(Vector v, Half* out, int n) {
    Half padded[kWidth];
    store(v, padded);
    for (int i = 0; i < n; ++i) out[i] = padded[i];
  }

  static PYRL_INLINE Vector add(Vector x, Vector y) { return _mm256_add_ps(x, y); }
  static PYRL_INLINE Vector mul(Vector x, Vector y) { return _mm256_mul_ps(x, y); }
  static PYRL_INLINE Vector divide(Vector x, Vector y) { return _mm256_div_ps(x, y); }
  static PYRL_INLINE Vector max(Vector x, Vector y) { return _mm256_max_ps(x, y); }
  static PYRL_INLINE Vector fma(Vector x, Vector y, Vector z) { return _mm256_fmadd_ps(x, y, z); }
  static PYRL_INLINE Vector fms(Vector x, Vector y, Vector z) { return _mm256_fmsub_ps(x, y, z); }
  static PYRL_INLINE Vector magnitude(Vector v) { return _mm256_andnot_ps(all(-0.0f), v); }
  static PYRL_INLINE Vector with_sign(Vector size, Vector sign) {
    return _mm256_or_ps(size, _mm256_and_ps(sign, all(-0.0f)));
  }

  static PYRL_INLINE Mask at_least(Vector x, Vector y) { return _mm256_cmp_ps(x, y, _CMP_NLT_UQ); }
  static PYRL_INLINE Mask above(Vector x, Vector y) { return _mm256_cmp_ps(x, y, _CMP_GT_OQ); }
  static PYRL_INLINE Mask both(Mask x, Mask y) { return _mm256_and_ps(x, y); }
  static PYRL_INLINE bool any(Mask mask) { return _mm256_movemask_ps(mask) != 0; }
  static PYRL_INLINE Vector choose(Mask mask, Vector x, Vector y) {
    return _mm256_blendv_ps(y, x, mask);
  }

  static PYRL_INLINE Vector exp2(Mask mask, Vector t) {
    const Vector limited = _mm256_min_ps(all(128), t);  // 2^128 is +inf; NaN stays
    const Vector whole = _mm256_floor_ps(limited);
    const Vector p = exp2_fraction<Avx2>(_mm256_sub_ps(limited, whole));
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(p), power);
    return _mm256_and_ps(mask, _mm256_castsi256_ps(bits));
  }
  static PYRL_INLINE Vector tanh(Vector x) { return tanh_lanes<Avx2>(x); }
  static PYRL_INLINE Vector mul_where(Mask mask, Vector x, Vector y) {
    return _mm256_and_ps(mask, _mm256_mul_ps(x, y));
  }
  static PYRL_INLINE Vector fma_where(Mask mask, Vector x, Vector y, Vector z) {
    return _mm256_fmadd_ps(x, _mm256_and_ps(mask, y), z);  // x is 0 outside the mask
  }

  static PYRL_INLINE double total(Vector v) {
    const __m256d halves = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                                         _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    const __m128d pair =
        _mm_add_pd(_mm256_castpd256_pd128(halves), _mm256_extractf128_pd(halves, 1));
    return _mm_cvtsd_f64(pair) + _mm_cvtsd_f64(_mm_unpackhi_pd(pair, pair));
  }
  static PYRL_INLINE double largest(Vector v) {
    float lanes[kWidth];
    store(v, lanes);
    float result = lanes[0];
    for (const float lane : lanes) result = lane > result ? lane : result;
    return static_cast<double>(result);
  }
};

}  // namespace
}  // namespace pyrl::logits::stats

namespace pyrl::logits {

template <typename Element>
const RowKernels<Element>& RowKernels<Element>::avx2() {
  static constexpr RowKernels table = stats::RowBody<stats::Avx2, Element>::table();
  return table;
}

template const RowKernels<float>& RowKernels<float>::avx2();
template const RowKernels<Float16>& RowKernels<Float16>::avx2();
template const RowKernels<BFloat16>& RowKernels<BFloat16>::avx2();

}  // namespace pyrl::logits
