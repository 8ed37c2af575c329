#include "logits/stats/lanes_avx512.h"

namespace pyrl::logits::stats {

const RowKernels<BFloat16>& avx512_bf16_kernels() {
  static constexpr RowKernels<BFloat16> table = RowBody<Avx512, BFloat16>::table();
  return table;
}

}  // namespace pyrl::logits::stats
