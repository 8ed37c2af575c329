// Leaves of a forest as flat rows for one padding-free forward pass.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tree/forest.h"

namespace pyrl::tree {

// I input tokens (prompt and response of each leaf, leaves concatenated), T response tokens in the
// same order. A shared token occurs once per leaf.
struct PackedRows {
  std::vector<std::int64_t> input, position;        // [I]
  std::vector<std::int32_t> cu_seqlens;             // [N + 1]
  std::vector<std::int64_t> label, leaf, segment;   // [T] segment: of Forest::segments(leaf)
  std::vector<float> logprob, entropy, confidence;  // [T]
  std::vector<std::uint8_t> forced;                 // [T]
};

PackedRows pack_flat(const Forest& forest, std::span<const std::int64_t> leaf);

}  // namespace pyrl::tree
