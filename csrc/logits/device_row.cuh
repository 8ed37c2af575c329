// How a team of 256 threads reads and writes a row of logits.
//
// Which of them takes which column, and so the order of all additions, is a function of the column
// alone: a row's results do not change with its place in the batch, its address or the grid.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "base/device.cuh"
#include "logits/matrix.h"

namespace pyrl::logits::device {

using namespace pyrl::device;

template <typename Element>
struct DeviceReal {
  using type = float;
};
template <>
struct DeviceReal<double> {
  using type = double;
};

__device__ inline float widen_device(float z) { return z; }
__device__ inline double widen_device(double z) { return z; }
__device__ inline float widen_device(Float16 z) { return __half2float(__ushort_as_half(z.bits)); }
__device__ inline float widen_device(BFloat16 z) {
  return __bfloat162float(__ushort_as_bfloat16(z.bits));
}

__device__ inline void round_to(float value, float& out) { out = value; }
__device__ inline void round_to(double value, double& out) { out = value; }
__device__ inline void round_to(float value, Float16& out) {
  out.bits = __half_as_ushort(__float2half_rn(value));
}
__device__ inline void round_to(float value, BFloat16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

__device__ inline float base2(float t) { return exp2f(t); }
__device__ inline double base2(double t) { return exp2(t); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// Below it 2^t is 0 in the type; a masked logit (t = -inf) is clamped to it, since 0 * inf is NaN.
template <typename R>
inline constexpr R kLeastExponent = R(-200);
template <>
inline constexpr double kLeastExponent<double> = -2000;

// Columns of a row are read in vectors of 16 bytes, four of them in flight in each thread.
template <typename Element>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(Element));
inline constexpr int kUnroll = 4;
template <typename Element>
inline constexpr int kGroup = kVector<Element> * kUnroll;

// Columns between the vectors of one thread, and column of element i of its group.
template <typename Element>
inline constexpr int kStride = kVector<Element> * kThreads;
template <typename Element>
__device__ constexpr int column_in_group(int i) {
  return i / kVector<Element> * kStride<Element> + i % kVector<Element>;
}

__device__ inline bool aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % sizeof(uint4) == 0;
}

// One vector; columns at and after n are -inf and not read.
template <typename Element, typename R>
__device__ void load_vector(const Element* z, std::int64_t n, bool vectors, R* out) {
  constexpr int kWidth = kVector<Element>;
  if (vectors && n >= kWidth) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(z);
    Element element[kWidth];
    memcpy(element, &bytes, sizeof bytes);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] = widen_device(element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] = i < n ? widen_device(z[i]) : R(-INFINITY);
  }
}

template <typename Element, typename R>
__device__ void store_vector(const R* value, std::int64_t n, bool vectors, Element* out) {
  constexpr int kWidth = kVector<Element>;
  Element element[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) round_to(value[i], element[i]);
  if (vectors && n >= kWidth) {
    uint4 bytes;
    memcpy(&bytes, element, sizeof bytes);
    *reinterpret_cast<uint4*>(out) = bytes;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < n) out[i] = element[i];
    }
  }
}

// Calls visit(z, first) with each group of columns begin <= column < end of a thread of the team;
// element i of a group is column first + column_in_group(i), or -inf beyond the end.
template <typename Element, typename Visit>
__device__ void sweep(const Element* row, std::int64_t begin, std::int64_t end, int thread,
                      Visit&& visit) {
  using R = typename DeviceReal<Element>::type;
  constexpr int kWidth = kVector<Element>;
  const bool vectors = aligned(row + begin);
  for (std::int64_t first = begin + thread * kWidth; first < end;
       first += kUnroll * kStride<Element>) {
    R z[kGroup<Element>];
    const std::int64_t last = first + (kUnroll - 1) * kStride<Element>;
    if (vectors && last + kWidth <= end) {  // without a branch between the loads
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        load_vector(row + first + k * kStride<Element>, kWidth, true, z + k * kWidth);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const std::int64_t at = first + k * kStride<Element>;
        load_vector(row + at, end - at, vectors, z + k * kWidth);
      }
    }
    visit(z, first);
  }
}

// Stores a group of the row's gradient.
template <typename Element, typename R>
__device__ void store_group(const R* value, std::int64_t first, std::int64_t end, bool vectors,
                            Element* row) {
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const std::int64_t at = first + k * kStride<Element>;
    store_vector(value + k * kVector<Element>, end - at, vectors, row + at);
  }
}

}  // namespace pyrl::logits::device
