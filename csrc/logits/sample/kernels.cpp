#include "logits/sample/kernels.h"

#include "base/isa.h"

namespace pyrl::logits::sample {

template <typename R>
const SampleKernels<R>& sample_kernels() {
#ifdef PYRL_X86
  switch (isa()) {
    case Isa::avx512_bf16:
    case Isa::avx512:
      return avx512_sample_kernels<R>();
    case Isa::avx2:
      return avx2_sample_kernels<R>();
    case Isa::scalar:
      break;
  }
#endif
  return scalar_sample_kernels<R>();
}

template const SampleKernels<float>& sample_kernels<float>();
template const SampleKernels<double>& sample_kernels<double>();

}  // namespace pyrl::logits::sample
