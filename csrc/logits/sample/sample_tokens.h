// Draws one token per row of logits. A row's draw is a function of its logits, seed and position
// alone: never of the other rows, the number of threads or the instruction set.
#pragma once

#include <cstdint>
#include <span>

#include "logits/row.h"
#include "logits/sample/truncation.h"

namespace pyrl::logits::sample {

struct SampledTokens {
  std::span<std::int32_t> token_B;
  std::span<float> logprob_B;            // nats, untruncated distribution at the temperature
  std::span<float> truncated_logprob_B;  // nats, distribution that the token is drawn from
  std::span<float> entropy_B;            // nats, untruncated distribution
  std::span<float> confidence_B;         // mass of its five most probable tokens
  // nats, mass in the distribution that truncation leaves of all tokens that are neither excluded
  // nor drawn
  std::span<float> rest_logprob_B;
};

// A row with NaN, +inf, or no token of any weight that is not excluded is not drawn: its token is
// -1.
void sample_tokens(const LogitMatrix& logits_BV, std::span<const std::uint64_t> seed_B,
                   std::span<const std::int64_t> position_B, const Truncation& truncation,
                   const Excluded& excluded, const SampledTokens& out, int threads);

}  // namespace pyrl::logits::sample
