// The loop over tokens of policy_loss, compiled once per instruction set. All give the same bits.
#pragma once

#include "base/isa.h"
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

// The sums of PolicyLossTotals, in lanes.
struct PolicySums {
  LaneSum loss, weight, clipped_low, clipped_high, clipped_dual, kl_old, penalty, ratio, ratio_max;
  bool refused = false;  // an advantage is not finite, or a radius negative
};

struct PolicyKernels {
  static constexpr Isa kWidest = Isa::avx512;
  static const PolicyKernels& scalar();
  static const PolicyKernels& avx2();
  static const PolicyKernels& avx512();

  void (*blocks)(const PolicyChunk& chunk, PolicySums& sums);
  void (*scan)(const ScanArgs& args, double* log_ratio);
};

PYRL_INLINE const PolicyKernels& policy_kernels() { return chosen<PolicyKernels>(); }

}  // namespace pyrl::loss
