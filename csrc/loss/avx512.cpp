#include "loss/body.h"

namespace pyrl::loss {

const PolicyKernels& PolicyKernels::avx512() { return kPolicyKernels; }

}  // namespace pyrl::loss
