// The element types and the layout of logits. Also read by nvcc, hence C++17.
#pragma once

#include <cstdint>

namespace pyrl::logits {

enum class Dtype : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

// Base-2 exponents of this size are held too coarsely to shift sums by. A logit so far below 0
// masks its token, as those do that are filled with the lowest number; one so far above breaks its
// row.
inline constexpr double kFarthest = 0x1p27, kFarthestOfFloat64 = 0x1p52;

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// A [rows, vocabulary] matrix whose columns are adjacent; row_stride counts elements.
struct LogitMatrix {
  const void* data;
  Dtype dtype;
  std::int64_t rows;
  std::int64_t vocabulary;
  std::int64_t row_stride;
};

inline constexpr std::int64_t kIgnoredLabel = -100;

// Calls visit with the matrix's element type: visit(static_cast<const float*>(data)).
template <typename Visit>
void with_elements(const LogitMatrix& matrix, Visit&& visit) {
  switch (matrix.dtype) {
    case Dtype::float32:
      return visit(static_cast<const float*>(matrix.data));
    case Dtype::float64:
      return visit(static_cast<const double*>(matrix.data));
    case Dtype::float16:
      return visit(static_cast<const Float16*>(matrix.data));
    case Dtype::bfloat16:
      return visit(static_cast<const BFloat16*>(matrix.data));
  }
}

}  // namespace pyrl::logits
