#include "logit_row.h"

#include <bit>
#include <cstring>

#include "check.h"

// One body, compiled for each instruction set and chosen at load. The lanes and their order are
// fixed and nothing is contracted into a fused multiply-add, so every clone gives the same bits.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define PYRL_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PYRL_CLONES
#endif
#define PYRL_INLINE [[gnu::always_inline]] inline

// Vectors only pass between functions that are inlined, so their calling convention is moot.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace pyrl {
namespace {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kSmallestExponent = -126;

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t IntLanes __attribute__((vector_size(4 * kLanes)));

PYRL_INLINE Lanes load(const float* z) {
  Lanes lanes;
  std::memcpy(&lanes, z, sizeof lanes);
  return lanes;
}

PYRL_INLINE Lanes load_tail(const float* z, int n, float fill) {
  float padded[kLanes];
  std::fill_n(padded, kLanes, fill);
  std::copy_n(z, n, padded);
  return load(padded);
}

PYRL_INLINE void store(float* out, const Lanes& lanes) { std::memcpy(out, &lanes, sizeof lanes); }

PYRL_INLINE void store_tail(float* out, int n, const Lanes& lanes) {
  float padded[kLanes];
  store(padded, lanes);
  std::copy_n(padded, n, out);
}

// 2^t for clamped t in [-126, 126]: minimax polynomial of degree 6 on [-1/2, 1/2], relative error
// 2e-9 before rounding, 2^0 = 1 exactly. Adding 1.5 * 2^23 leaves the integer part in the low bits.
PYRL_INLINE Lanes exp2_lanes(const Lanes& t) {
  constexpr float kRound = 12582912.0f;
  const Lanes rounded = t + kRound;
  const Lanes r = t - (rounded - kRound);
  Lanes p = r * 1.5345812e-4f + 1.33999312e-3f;
  p = p * r + 9.61848896e-3f;
  p = p * r + 5.55032878e-2f;
  p = p * r + 2.40226469e-1f;
  p = p * r + 6.93147206e-1f;
  p = p * r + 1.0f;
  return std::bit_cast<Lanes>(std::bit_cast<IntLanes>(p) +
                              (std::bit_cast<IntLanes>(rounded) << 23));
}

// Clamping before the exponential keeps 0 * inf out of the moment; a masked token weighs exactly 0.
PYRL_INLINE void weigh(const Lanes& z, float maximum, float scale, Lanes& t, Lanes& weight) {
  const Lanes exact = (z - maximum) * scale;
  const Lanes smallest = Lanes{} + kSmallestExponent;
  t = exact < smallest ? smallest : exact;
  weight = exact < smallest ? Lanes{} : exp2_lanes(t);
}

PYRL_INLINE double total(const Lanes& lanes) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(lanes[lane]);
  return sum;
}

PYRL_INLINE Lanes gradient_lanes(const Lanes& z, const GradientRow<float>& row) {
  Lanes t = ((z - row.shift) - row.rest) * row.scale;
  const Lanes smallest = Lanes{} + kSmallestExponent;
  const IntLanes masked = t < smallest;
  t = masked ? smallest : t;
  const Lanes weight = masked ? Lanes{} : exp2_lanes(t);
  return weight * (row.constant + row.slope * t);
}

PYRL_INLINE float half_to_float(std::uint16_t half) {
  const std::uint32_t magnitude = (half & 0x7fffu) << 13;
  // The exponent bias differs by 112; the product also normalises subnormals.
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | special | sign);
}

PYRL_INLINE std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const float magnitude = std::abs(value);
  std::uint32_t half;
  if (!(magnitude < 65536.0f)) {
    half = std::isnan(value) ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    // The sum's last bit is worth 2^-24, the step of half subnormals: the addition rounds.
    half = std::bit_cast<std::uint32_t>(magnitude + 0.5f) - std::bit_cast<std::uint32_t>(0.5f);
  } else {
    const std::uint32_t rebiased = std::bit_cast<std::uint32_t>(magnitude) - (112u << 23);
    half = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  }
  return static_cast<std::uint16_t>(half | sign);
}

PYRL_INLINE std::uint16_t float_to_bfloat(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <typename R>
void insert_top(R value, R* top) {
  int place = kTop - 1;
  for (; place > 0 && top[place - 1] < value; --place) top[place] = top[place - 1];
  top[place] = value;
}

}  // namespace

double exponent_scale(double temperature) {
  const double scale = std::numbers::log2e / temperature;
  PYRL_CHECK(temperature > 0 && std::isfinite(temperature) && scale <= 1e30,
             "temperature: expected a finite number > 0, got ", temperature);
  return scale;
}

PYRL_CLONES float block_max(const float* z, int n) {
  Lanes maximum = Lanes{} - kInfinity;
  IntLanes invalid{};
  const auto visit = [&](const Lanes& lanes) __attribute__((always_inline)) {
    maximum = lanes > maximum ? lanes : maximum;
    invalid |= ~(lanes < kInfinity);
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) visit(load(z + i));
  if (i < n) visit(load_tail(z + i, n - i, -kInfinity));
  float result = -kInfinity;
  std::int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    result = std::max(result, maximum[lane]);
    any |= invalid[lane];
  }
  return any != 0 ? std::numeric_limits<float>::quiet_NaN() : result;
}

PYRL_CLONES BlockSums block_sums(const float* z, int n, float maximum, float scale) {
  Lanes sum{}, moment{};
  const auto visit = [&](const Lanes& lanes) __attribute__((always_inline)) {
    Lanes t, weight;
    weigh(lanes, maximum, scale, t, weight);
    sum += weight;
    moment += weight * t;
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) visit(load(z + i));
  if (i < n) visit(load_tail(z + i, n - i, -kInfinity));
  return {total(sum), total(moment)};
}

PYRL_CLONES void block_weights(const float* z, float* weight, int n, float maximum, float scale) {
  Lanes t, lanes;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    weigh(load(z + i), maximum, scale, t, lanes);
    store(weight + i, lanes);
  }
  if (i == n) return;
  weigh(load_tail(z + i, n - i, -kInfinity), maximum, scale, t, lanes);
  store_tail(weight + i, n - i, lanes);
}

PYRL_CLONES void block_gradient(const float* z, float* dz, int n, const GradientRow<float>& row) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dz + i, gradient_lanes(load(z + i), row));
  if (i < n) {
    store_tail(dz + i, n - i, gradient_lanes(load_tail(z + i, n - i, -kInfinity), row));
  }
}

PYRL_CLONES void block_top(const float* z, int n, float* top) {
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    const float least = top[kTop - 1];
    const IntLanes larger = (load(z + i) > least) | (load(z + i + kLanes) > least) |
                            (load(z + i + 2 * kLanes) > least) | (load(z + i + 3 * kLanes) > least);
    std::int32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= larger[lane];
    if (any == 0) continue;
    for (int j = i; j < i + 4 * kLanes; ++j) {
      if (z[j] > top[kTop - 1]) insert_top(z[j], top);
    }
  }
  for (; i < n; ++i) {
    if (z[i] > top[kTop - 1]) insert_top(z[i], top);
  }
}

PYRL_CLONES const float* widen(const Float16* z, int n, float* buffer) {
  for (int i = 0; i < n; ++i) buffer[i] = half_to_float(z[i].bits);
  return buffer;
}

PYRL_CLONES const float* widen(const BFloat16* z, int n, float* buffer) {
  for (int i = 0; i < n; ++i) {
    buffer[i] = std::bit_cast<float>(static_cast<std::uint32_t>(z[i].bits) << 16);
  }
  return buffer;
}

PYRL_CLONES void narrow(const float* value, int n, Float16* out) {
  for (int i = 0; i < n; ++i) out[i].bits = float_to_half(value[i]);
}

PYRL_CLONES void narrow(const float* value, int n, BFloat16* out) {
  for (int i = 0; i < n; ++i) out[i].bits = float_to_bfloat(value[i]);
}

// ---- float64: the same sums, one element at a time ----

double block_max(const double* z, int n) {
  double maximum = kMinusInfinity;
  for (int i = 0; i < n; ++i) {
    if (!(z[i] < -kMinusInfinity)) return std::numeric_limits<double>::quiet_NaN();
    maximum = std::max(maximum, z[i]);
  }
  return maximum;
}

BlockSums block_sums(const double* z, int n, double maximum, double scale) {
  BlockSums sums{0, 0};
  for (int i = 0; i < n; ++i) {
    const double t = (z[i] - maximum) * scale;
    const double weight = std::exp2(t);
    sums.sum += weight;
    sums.moment += weight == 0 ? 0 : weight * t;
  }
  return sums;
}

void block_weights(const double* z, double* weight, int n, double maximum, double scale) {
  for (int i = 0; i < n; ++i) weight[i] = std::exp2((z[i] - maximum) * scale);
}

void block_gradient(const double* z, double* dz, int n, const GradientRow<double>& row) {
  for (int i = 0; i < n; ++i) {
    const double t = ((z[i] - row.shift) - row.rest) * row.scale;
    const double weight = std::exp2(t);
    dz[i] = weight == 0 ? 0 : weight * (row.constant + row.slope * t);
  }
}

void block_top(const double* z, int n, double* top) {
  for (int i = 0; i < n; ++i) {
    if (z[i] > top[kTop - 1]) insert_top(z[i], top);
  }
}

}  // namespace pyrl
