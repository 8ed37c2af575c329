// The baseline of the architecture.
#include "loss/body.h"

namespace pyrl::loss {

const PolicyKernels kPolicyKernelsScalar{policy_blocks, scan_log_ratio};

}  // namespace pyrl::loss
