#include "logits/kernels.h"

#include <type_traits>

#include "base/isa.h"

namespace pyrl::logits {

template <typename Element>
const RowKernels<Element>& row_kernels() {
  if constexpr (sizeof(Element) == sizeof(double)) {
    return scalar_kernels<Element>();
  } else {
#ifdef PYRL_X86
    switch (isa()) {
      case Isa::avx512_bf16:
        if constexpr (std::is_same_v<Element, BFloat16>) return avx512_bf16_kernels();
        [[fallthrough]];
      case Isa::avx512:
        return avx512_kernels<Element>();
      case Isa::avx2:
        return avx2_kernels<Element>();
      case Isa::scalar:
        break;
    }
#endif
    return scalar_kernels<Element>();
  }
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const RowKernels<Float16>& row_kernels<Float16>();
template const RowKernels<BFloat16>& row_kernels<BFloat16>();

}  // namespace pyrl::logits
