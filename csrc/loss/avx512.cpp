// Compiled for avx512: CMakeLists.txt.
#ifdef __x86_64__

#include "loss/body.h"

namespace pyrl::loss {

const PolicyKernels kPolicyKernelsAvx512{policy_blocks, scan_log_ratio};

}  // namespace pyrl::loss

#endif
