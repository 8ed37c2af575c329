// A column of numbers per token, float32 or float64, read as float64 in blocks. C++17, also nvcc.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "base/inline.h"

namespace pyrl::loss {

inline constexpr int kTokenBlock = 128;
inline constexpr int kLanes = 8;  // interleaved parts of a sum

struct Column {
  const float* narrow = nullptr;
  const double* wide = nullptr;

  PYRL_INLINE explicit operator bool() const { return narrow || wide; }
  PYRL_INLINE double operator[](std::size_t t) const {
    return wide ? wide[t] : static_cast<double>(narrow[t]);
  }
};

// Tokens begin to begin + n, n <= kTokenBlock: in place, or widened into the buffer.
static inline const double* read(const Column& column, std::size_t begin, int n, double* buffer) {
  if (column.wide) return column.wide + begin;
  for (int i = 0; i < n; ++i) buffer[i] = static_cast<double>(column.narrow[begin + i]);
  return buffer;
}

// Responses lie one after the other; leaf l has tokens offset_N1[l] to offset_N1[l + 1].
struct Responses {
  std::size_t tokens = 0;
  const std::uint8_t* mask_T = nullptr;  // 0: the token takes no part; null: all take part
  const std::int64_t* offset_N1 = nullptr;
  std::size_t leaves = 0;

  PYRL_INLINE bool used(std::size_t t) const { return !mask_T || mask_T[t]; }
};

// A sum in token order, in interleaved parts: the same for every instruction set.
struct LaneSum {
  double lane[kLanes] = {};
};

static inline void add(LaneSum& sum, const double* values, int n) {
  double lane[8];  // local: the values could be the sum's
  for (int j = 0; j < 8; ++j) lane[j] = sum.lane[j];
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) lane[j] += values[i + j];
  for (int j = 0; j < 8 && i < n; ++i, ++j) lane[j] += values[i];
  for (int j = 0; j < 8; ++j) sum.lane[j] = lane[j];
}

static inline double total(const LaneSum& sum) {
  const double* x = sum.lane;
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

template <typename Visit>
static inline void for_blocks(std::size_t begin, std::size_t end, Visit visit) {
  for (std::size_t t = begin; t < end; t += kTokenBlock)
    visit(t, static_cast<int>(std::min<std::size_t>(kTokenBlock, end - t)));
}

}  // namespace pyrl::loss
