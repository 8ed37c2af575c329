// Draws one token per row of logits on a CUDA device; the rule of the draw: sample_tokens.h. C++17.
#pragma once

#include "logits/matrix.h"
#include "logits/sample/truncation.h"

namespace pyrl::logits::sample {

// Pointers are device pointers.
struct SampleRowsArgs {
  LogitMatrix logits_BV;
  const double* uniform_B;  // in [0, 1)
  Truncation truncation;
  Excluded excluded;
  // Rows: token, logprob, truncated logprob, entropy, confidence, rest logprob. A row with NaN,
  // +inf, or no token of any weight that is not excluded is not drawn: token -1, else zeros.
  double* out_KB;
};

// On the caller's stream (a cudaStream_t); at most 1310720 columns.
void sample_rows_cuda(const SampleRowsArgs& args, int device, void* stream);

}  // namespace pyrl::logits::sample
