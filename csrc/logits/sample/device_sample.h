// Draws one token per row of logits on a CUDA device; the rule of the draw: sample_tokens.h. C++17.
#pragma once

#include "logits/matrix.h"

namespace pyrl::logits::sample {

// Pointers are device pointers.
struct SampleRowsArgs {
  LogitMatrix logits_BV;
  const double* uniform_B;  // in [0, 1)
  double temperature;       // 0: the most probable token, statistics at temperature 1
  std::int64_t top_k;       // 0 keeps all
  double top_p;
  double min_p;
  // Rows: token, logprob, truncated logprob, entropy, confidence. A row with NaN, +inf or nothing
  // but -inf is not drawn: token -1, else zeros.
  double* out_KB;
};

// On the caller's stream (a cudaStream_t); at most 1310720 columns.
void sample_rows_cuda(const SampleRowsArgs& args, int device, void* stream);

}  // namespace pyrl::logits::sample
