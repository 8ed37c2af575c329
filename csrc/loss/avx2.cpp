// Compiled for avx2: CMakeLists.txt.
#ifdef __x86_64__

#include "loss/body.h"

namespace pyrl::loss {

const PolicyKernels kPolicyKernelsAvx2{policy_blocks, exp_values, log_values, scan_log_ratio};

}  // namespace pyrl::loss

#endif
