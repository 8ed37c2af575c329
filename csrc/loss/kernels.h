// The loop over tokens of policy_loss, compiled once per instruction set. All give the same bits.
#pragma once

#include <vector>

#include "loss/policy_loss.h"

namespace pyrl::loss {

// Tokens of whole responses; without responses, all tokens.
struct PolicyChunk {
  const PolicyLossArgs* args;
  std::size_t begin, end;
  std::size_t leaf;         // the first one
  const double* log_ratio;  // of these tokens; null: no scan
  const double* low;        // by position in the response; null: no such bounds
  const double* high;
  const double* dual;
};

// As PolicyLossTotals, in lanes.
struct PolicySums {
  LaneSum loss, weight, clipped_low, clipped_high, clipped_dual, kl_old, penalty, ratio, ratio_max;
  bool refused = false;  // an advantage is not finite, or a radius negative
};

struct PolicyKernels {
  void (*blocks)(const PolicyChunk& chunk, PolicySums& sums);
  void (*scan)(const ScanArgs& args, double* log_ratio);
};

extern const PolicyKernels kPolicyKernelsScalar;
#ifdef __x86_64__
extern const PolicyKernels kPolicyKernelsAvx2;
extern const PolicyKernels kPolicyKernelsAvx512;
#endif

const PolicyKernels& policy_kernels();  // of this machine

}  // namespace pyrl::loss
