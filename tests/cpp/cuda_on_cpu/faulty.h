// Kernels with one fault each, which the emulation must notice.
#pragma once

#include <string>

namespace cuda_on_cpu {

// "sum" has none; "missing barrier", "unwritten", "divergent", "early exit".
double run_faulty(const std::string& name);

}  // namespace cuda_on_cpu
