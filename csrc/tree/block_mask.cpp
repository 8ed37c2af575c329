// Blocks of queries and keys by intervals: no pair of tokens is looked at.
#include <algorithm>
#include <limits>

#include "base/check.h"
#include "tree/pack_tree.h"

namespace pyrl::tree {

BlockMask block_mask(std::span<const std::int64_t> end, std::int64_t block) {
  PYRL_CHECK(block >= 2, "block_mask: expected blocks of at least 2 tokens, got ", block);
  const auto tokens = static_cast<std::int64_t>(end.size());
  for (std::int64_t k = 0; k < tokens; ++k)
    PYRL_CHECK(end[k] > k && end[k] <= tokens, "block_mask: expected an end from ", k + 1, " to ",
               tokens, " for token ", k, ", got ", end[k]);
  const std::int64_t blocks = (tokens + block - 1) / block;
  std::vector<std::int64_t> first(blocks, std::numeric_limits<std::int64_t>::max()), last(blocks);
  for (std::int64_t k = 0; k < tokens; ++k) {
    first[k / block] = std::min(first[k / block], end[k]);
    last[k / block] = std::max(last[k / block], end[k]);
  }
  BlockMask mask;
  mask.partial_count.resize(blocks);
  mask.full_count.resize(blocks);
  mask.partial.resize(blocks * blocks);
  mask.full.resize(blocks * blocks);
  for (std::int64_t q = 0; q < blocks; ++q) {
    const std::int64_t begin = q * block, stop = std::min(begin + block, tokens);
    std::int32_t* partial = mask.partial.data() + q * blocks;
    std::int32_t* full = mask.full.data() + q * blocks;
    std::int32_t partials = 0, fulls = 0;
    for (std::int64_t k = 0; k < q; ++k) {
      // The rows past the last token of a block that is not whole count as unseen, as in torch.
      const bool all = first[k] >= stop && stop == begin + block;
      if (all)
        full[fulls++] = static_cast<std::int32_t>(k);
      else if (last[k] > begin)
        partial[partials++] = static_cast<std::int32_t>(k);
    }
    partial[partials++] = static_cast<std::int32_t>(q);
    mask.partial_count[q] = partials;
    mask.full_count[q] = fulls;
  }
  return mask;
}

}  // namespace pyrl::tree
