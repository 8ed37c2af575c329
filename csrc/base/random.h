// Random numbers that are a function of a seed and a position alone.
#pragma once

#include <cstdint>
#include <span>

namespace pyrl {

// Uniform number in [0, 1) with 53 random bits: Philox4x32-10 (Salmon et al., SC 2011) with key =
// seed and counter = (position, stream), low words first; the first two output words, high word
// first. Stream 0 draws tokens.
double uniform(std::uint64_t seed, std::uint64_t position, std::uint64_t stream = 0);
void uniforms(std::span<const std::uint64_t> seed_B, std::span<const std::int64_t> position_B,
              std::span<double> uniform_B);

}  // namespace pyrl
