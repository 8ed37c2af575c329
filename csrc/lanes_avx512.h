// Sixteen floats. Included by the files that are compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "row_body.h"

namespace pyrl {
namespace {

// 2^(k / 32)
alignas(64) constexpr float kPowers[32] = {
    1.0f,       1.0218972f, 1.0442737f, 1.0671405f, 1.0905077f, 1.1143868f, 1.1387886f, 1.1637249f,
    1.1892071f, 1.2152474f, 1.2418578f, 1.269051f,  1.2968396f, 1.3252367f, 1.3542556f, 1.38391f,
    1.4142135f, 1.4451808f, 1.4768262f, 1.5091645f, 1.5422108f, 1.5759809f, 1.6104903f, 1.6457555f,
    1.6817929f, 1.7186193f, 1.7562522f, 1.7947091f, 1.8340081f, 1.8741677f, 1.9152066f, 1.9571441f};

struct Avx512 {
  using Vector = __m512;
  using Mask = __mmask16;
  using Scalar = float;
  static constexpr int kWidth = 16;
  static constexpr float kSmallest = -1e30f;  // only -inf is below: scalef underflows gradually
  static constexpr bool kClamps = false;

  static PYRL_LANE Vector all(float x) { return _mm512_set1_ps(x); }
  static PYRL_LANE Mask first(int n) { return static_cast<Mask>((1u << n) - 1); }
  static PYRL_LANE Vector head(Vector v, int n) { return _mm512_maskz_mov_ps(first(n), v); }

  static PYRL_LANE Vector load(const float* z) { return _mm512_loadu_ps(z); }
  static PYRL_LANE Vector load(const float* z, int n) {
    return _mm512_mask_loadu_ps(all(-__builtin_inff()), first(n), z);
  }
  static PYRL_LANE Vector widen(const Float16*, __m256i bits) { return _mm512_cvtph_ps(bits); }
  static PYRL_LANE Vector widen(const BFloat16*, __m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  template <typename Half>
  static PYRL_LANE Vector load(const Half* z) {
    return widen(z, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(z)));
  }
  template <typename Half>
  static PYRL_LANE Vector load(const Half* z, int n) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first(n), z);
    return _mm512_mask_mov_ps(all(-__builtin_inff()), first(n), widen(z, bits));
  }

  static PYRL_LANE void store(Vector v, float* out) { _mm512_storeu_ps(out, v); }
  static PYRL_LANE void store(Vector v, float* out, int n) {
    _mm512_mask_storeu_ps(out, first(n), v);
  }
  static PYRL_LANE __m256i narrow(Vector v, const Float16*) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static PYRL_LANE __m256i narrow(Vector v, const BFloat16*) {
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
  static PYRL_LANE void store(Vector v, Half* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow(v, out));
  }
  template <typename Half>
  static PYRL_LANE void store(Vector v, Half* out, int n) {
    _mm256_mask_storeu_epi16(out, first(n), narrow(v, out));
  }

  static PYRL_LANE Vector add(Vector x, Vector y) { return _mm512_add_ps(x, y); }
  static PYRL_LANE Vector mul(Vector x, Vector y) { return _mm512_mul_ps(x, y); }
  static PYRL_LANE Vector divide(Vector x, Vector y) { return _mm512_div_ps(x, y); }
  static PYRL_LANE Vector max(Vector x, Vector y) { return _mm512_max_ps(x, y); }
  static PYRL_LANE Vector fma(Vector x, Vector y, Vector z) { return _mm512_fmadd_ps(x, y, z); }
  static PYRL_LANE Vector fms(Vector x, Vector y, Vector z) { return _mm512_fmsub_ps(x, y, z); }
  static PYRL_LANE Vector magnitude(Vector v) { return _mm512_abs_ps(v); }
  static PYRL_LANE Vector with_sign(Vector size, Vector sign) {
    return _mm512_or_ps(size, _mm512_and_ps(sign, all(-0.0f)));
  }

  static PYRL_LANE Mask at_least(Vector x, Vector y) {
    return _mm512_cmp_ps_mask(x, y, _CMP_NLT_UQ);
  }
  static PYRL_LANE Mask above(Vector x, Vector y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ); }
  static PYRL_LANE Mask both(Mask x, Mask y) { return x & y; }
  static PYRL_LANE bool any(Mask mask) { return mask != 0; }
  static PYRL_LANE Vector choose(Mask mask, Vector x, Vector y) {
    return _mm512_mask_mov_ps(y, mask, x);
  }

  // 2^t without its whole part: 2^(k / 32) from two registers, then a minimax polynomial of degree
  // 2 on [0, 1/32), relative error 6.5e-8 before rounding; 2^0 = 1 exactly. Rounded down, t + 1.5 *
  // 2^18 has k in its lowest bits. -inf gives 1.
  static PYRL_LANE Vector exp2_fraction(Vector t) {
    const Vector r = _mm512_reduce_ps(t, 5 << 4 | _MM_FROUND_TO_NEG_INF);
    const Vector shifted =
        _mm512_add_round_ps(t, all(393216.0f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const Vector power = _mm512_permutex2var_ps(
        _mm512_load_ps(kPowers), _mm512_castps_si512(shifted), _mm512_load_ps(kPowers + kWidth));
    const Vector rest = mul(r, fma(all(2.4265269e-1f), r, all(6.9312373e-1f)));
    return fma(power, rest, power);
  }
  // scalef takes the floor of t itself.
  static PYRL_LANE Vector exp2(Mask mask, Vector t) {
    return _mm512_maskz_scalef_ps(mask, exp2_fraction(t), t);
  }
  static PYRL_LANE Vector exp2(Vector t) { return _mm512_scalef_ps(exp2_fraction(t), t); }
  static PYRL_LANE Vector tanh(Vector x) { return tanh_lanes<Avx512>(x); }
  static PYRL_LANE Vector mul_where(Mask mask, Vector x, Vector y) {
    return _mm512_maskz_mul_ps(mask, x, y);
  }
  static PYRL_LANE Vector fma_where(Mask mask, Vector x, Vector y, Vector z) {
    return _mm512_mask3_fmadd_ps(x, y, z, mask);
  }

  static PYRL_LANE double total(Vector v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
  static PYRL_LANE double largest(Vector v) { return static_cast<double>(_mm512_reduce_max_ps(v)); }
};

}  // namespace
}  // namespace pyrl
