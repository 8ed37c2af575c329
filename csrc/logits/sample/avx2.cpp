#include "logits/sample/body.h"

namespace pyrl::logits::sample {

template <>
const SampleKernels<float>& avx2_sample_kernels<float>() {
  return kKernels<float>;
}

template <>
const SampleKernels<double>& avx2_sample_kernels<double>() {
  return kKernels<double>;
}

}  // namespace pyrl::logits::sample
