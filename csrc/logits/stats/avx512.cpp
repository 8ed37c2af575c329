#include "logits/stats/lanes_avx512.h"

namespace pyrl::logits {

template <typename Element>
const RowKernels<Element>& avx512_kernels() {
  static constexpr RowKernels<Element> table = stats::RowBody<stats::Avx512, Element>::table();
  return table;
}

template const RowKernels<float>& avx512_kernels<float>();
template const RowKernels<Float16>& avx512_kernels<Float16>();
template const RowKernels<BFloat16>& avx512_kernels<BFloat16>();

}  // namespace pyrl::logits
