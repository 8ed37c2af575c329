// Sixteen floats. Included by the files that are compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "logits/stats/body.h"

namespace pyrl::logits::stats {
namespace {

// 0.2410994 2^(k / 32 - floor(k / 32 - 1.4375)): scalef takes the floor of its exponent.
alignas(64) constexpr float kPowers[32] = {
    0.96439773f, 0.98551518f, 1.0070952f,  1.0291477f,  1.0516831f,  1.0747119f,  1.098245f,
    1.1222935f,  1.1468686f,  1.1719817f,  1.1976447f,  1.2238698f,  1.250669f,   1.2780551f,
    0.65302044f, 0.66731972f, 0.68193209f, 0.69686449f, 0.71212381f, 0.72771728f, 0.74365222f,
    0.75993609f, 0.77657652f, 0.79358137f, 0.8109585f,  0.82871622f, 0.84686273f, 0.86540657f,
    0.88435656f, 0.90372145f, 0.92351037f, 0.94373256f};

struct Avx512 {
  using Vector = __m512;
  using Mask = __mmask16;
  using Scalar = float;
  static constexpr int kWidth = 16;
  static constexpr float kSmallest = -1e30f;  // only -inf is below: scalef underflows gradually
  static constexpr bool kClamps = false;

  static PYRL_INLINE Vector all(float x) { return _mm512_set1_ps(x); }
  static PYRL_INLINE Mask first(int n) { return static_cast<Mask>((1u << n) - 1); }
  static PYRL_INLINE Vector head(Vector v, int n) { return _mm512_maskz_mov_ps(first(n), v); }

  static PYRL_INLINE Vector load(const float* z) { return _mm512_loadu_ps(z); }
  static PYRL_INLINE Vector load(const float* z, int n) {
    return _mm512_mask_loadu_ps(all(-__builtin_inff()), first(n), z);
  }
  static PYRL_INLINE Vector widen(const Float16*, __m256i bits) { return _mm512_cvtph_ps(bits); }
  static PYRL_INLINE Vector widen(const BFloat16*, __m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  template <typename Half>
  static PYRL_INLINE Vector load(const Half* z) {
    return widen(z, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(z)));
  }
  template <typename Half>
  static PYRL_INLINE Vector load(const Half* z, int n) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first(n), z);
    return _mm512_mask_mov_ps(all(-__builtin_inff()), first(n), widen(z, bits));
  }

  static PYRL_INLINE void store(Vector v, float* out) { _mm512_storeu_ps(out, v); }
  static PYRL_INLINE void store(Vector v, float* out, int n) {
    _mm512_mask_storeu_ps(out, first(n), v);
  }
  static PYRL_INLINE __m256i narrow(Vector v, const Float16*) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static PYRL_INLINE __m256i narrow(Vector v, const BFloat16*) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    // To nearest even; NaN becomes quiet; what is subnormal becomes a zero.
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits,
                                   _mm512_set1_epi32(0x400000));
    const __mmask16 tiny = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
    rounded = _mm512_mask_and_epi32(rounded, tiny, bits, _mm512_set1_epi32(0x80000000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
  }
  template <typename Half>
  static PYRL_INLINE void store(Vector v, Half* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow(v, out));
  }
  template <typename Half>
  static PYRL_INLINE void store(Vector v, Half* out, int n) {
    _mm256_mask_storeu_epi16(out, first(n), narrow(v, out));
  }

  static PYRL_INLINE Vector add(Vector x, Vector y) { return _mm512_add_ps(x, y); }
  static PYRL_INLINE Vector mul(Vector x, Vector y) { return _mm512_mul_ps(x, y); }
  static PYRL_INLINE Vector divide(Vector x, Vector y) { return _mm512_div_ps(x, y); }
  static PYRL_INLINE Vector max(Vector x, Vector y) { return _mm512_max_ps(x, y); }
  static PYRL_INLINE Vector fma(Vector x, Vector y, Vector z) { return _mm512_fmadd_ps(x, y, z); }
  static PYRL_INLINE Vector fms(Vector x, Vector y, Vector z) { return _mm512_fmsub_ps(x, y, z); }
  static PYRL_INLINE Vector magnitude(Vector v) { return _mm512_abs_ps(v); }
  static PYRL_INLINE Vector with_sign(Vector size, Vector sign) {
    return _mm512_or_ps(size, _mm512_and_ps(sign, all(-0.0f)));
  }

  static PYRL_INLINE Mask at_least(Vector x, Vector y) {
    return _mm512_cmp_ps_mask(x, y, _CMP_NLT_UQ);
  }
  static PYRL_INLINE Mask above(Vector x, Vector y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ); }
  static PYRL_INLINE Mask both(Mask x, Mask y) { return x & y; }
  static PYRL_INLINE bool any(Mask mask) { return mask != 0; }
  static PYRL_INLINE Vector choose(Mask mask, Vector x, Vector y) {
    return _mm512_mask_mov_ps(y, mask, x);
  }

  // t = whole + k / 32 + r with |r| <= 1/64: the sum is rounded to a multiple of 1/32 and has k in
  // its lowest bits. 2^r is the parabola 0.2410994 ((r + 1.4375)^2 + 2.08126), of those with a
  // vertex at a multiple of 1/32 the best (relative error 1.3e-7 before rounding): then r + 1.4375
  // is one subtraction. Multiplications bound the sweeps on Zen 4; this has one less than Horner's
  // rule. 2^0 = 1 exactly; NaN for -inf inside the mask.
  static PYRL_INLINE Vector exp2(Mask mask, Vector t) {
    constexpr float kRound = 393216;  // 1.5 2^18: of this size floats are 1/32 apart
    const Vector sum = add(t, all(kRound));
    const Vector below = _mm512_sub_ps(sum, all(kRound + 1.4375f));
    const Vector y = _mm512_sub_ps(t, below);
    const Vector power = _mm512_permutex2var_ps(_mm512_load_ps(kPowers), _mm512_castps_si512(sum),
                                                _mm512_load_ps(kPowers + kWidth));
    return _mm512_maskz_scalef_ps(mask, mul(power, fma(y, y, all(2.0812602f))), below);
  }
  static PYRL_INLINE Vector exp2(Vector t) { return exp2(static_cast<Mask>(-1), t); }
  static PYRL_INLINE Vector tanh(Vector x) { return tanh_lanes<Avx512>(x); }
  static PYRL_INLINE Vector mul_where(Mask mask, Vector x, Vector y) {
    return _mm512_maskz_mul_ps(mask, x, y);
  }
  static PYRL_INLINE Vector fma_where(Mask mask, Vector x, Vector y, Vector z) {
    return _mm512_mask3_fmadd_ps(x, y, z, mask);
  }

  static PYRL_INLINE double total(Vector v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
  static PYRL_INLINE double largest(Vector v) {
    return static_cast<double>(_mm512_reduce_max_ps(v));
  }
};

}  // namespace
}  // namespace pyrl::logits::stats
