#include "logits/sample/body.h"

namespace pyrl::logits::sample {

template <typename R>
const SampleKernels<R>& SampleKernels<R>::avx2() {
  return kKernels<R>;
}

template const SampleKernels<float>& SampleKernels<float>::avx2();
template const SampleKernels<double>& SampleKernels<double>::avx2();

}  // namespace pyrl::logits::sample
