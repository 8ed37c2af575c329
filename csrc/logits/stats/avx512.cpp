#include "logits/stats/lanes_avx512.h"

namespace pyrl::logits {

template <typename Element>
const RowKernels<Element>& RowKernels<Element>::avx512() {
  static constexpr RowKernels table = stats::RowBody<stats::Avx512, Element>::table();
  return table;
}

template const RowKernels<float>& RowKernels<float>::avx512();
template const RowKernels<Float16>& RowKernels<Float16>::avx512();
template const RowKernels<BFloat16>& RowKernels<BFloat16>::avx512();

}  // namespace pyrl::logits
