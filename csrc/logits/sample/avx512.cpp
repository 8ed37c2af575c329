#include "logits/sample/body.h"

namespace pyrl::logits::sample {

template <typename R>
const SampleKernels<R>& SampleKernels<R>::avx512() {
  return kKernels<R>;
}

template const SampleKernels<float>& SampleKernels<float>::avx512();
template const SampleKernels<double>& SampleKernels<double>::avx512();

}  // namespace pyrl::logits::sample
