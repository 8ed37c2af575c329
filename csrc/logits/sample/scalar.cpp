#include "logits/sample/body.h"

namespace pyrl::logits::sample {

template <typename R>
const SampleKernels<R>& SampleKernels<R>::scalar() {
  return kKernels<R>;
}

template const SampleKernels<float>& SampleKernels<float>::scalar();
template const SampleKernels<double>& SampleKernels<double>::scalar();

}  // namespace pyrl::logits::sample
