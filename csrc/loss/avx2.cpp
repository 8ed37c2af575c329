#include "loss/body.h"

namespace pyrl::loss {

const PolicyKernels& PolicyKernels::avx2() { return kPolicyKernels; }

}  // namespace pyrl::loss
