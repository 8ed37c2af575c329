// Compiled for avx2: CMakeLists.txt.
#ifdef __x86_64__

#include "loss/body.h"

namespace pyrl::loss {

const PolicyKernels kPolicyKernelsAvx2{policy_blocks, scan_log_ratio};

}  // namespace pyrl::loss

#endif
