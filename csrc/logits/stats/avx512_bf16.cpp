#include "logits/stats/lanes_avx512.h"

namespace pyrl::logits {

template <typename Element>
const RowKernels<Element>& RowKernels<Element>::avx512_bf16() {
  static constexpr RowKernels table = stats::RowBody<stats::Avx512, Element>::table();
  return table;
}

template const RowKernels<BFloat16>& RowKernels<BFloat16>::avx512_bf16();

}  // namespace pyrl::logits
