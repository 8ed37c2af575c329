#include "logits/stats/lanes_avx512.h"

namespace pyrl::logits {

const RowKernels<BFloat16>& avx512_bf16_kernels() {
  static constexpr RowKernels<BFloat16> table = stats::RowBody<stats::Avx512, BFloat16>::table();
  return table;
}

}  // namespace pyrl::logits
