#include "loss/body.h"

namespace pyrl::loss {

const PolicyKernels& PolicyKernels::scalar() { return kPolicyKernels; }

}  // namespace pyrl::loss
