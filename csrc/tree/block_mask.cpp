// Blocks of queries and keys by intervals: no pair of tokens is looked at, and a row of blocks
// costs what it sees.
#include <algorithm>
#include <vector>

#include "base/check.h"
#include "tree/pack_tree.h"

namespace pyrl::tree {
namespace {

// A block of keys, and the least and the greatest end of its tokens.
struct Keys {
  std::int32_t block;
  std::int64_t first, last;
};

// The ends of the tokens from `begin` on, one block; throws at one that ends before it begins.
Keys keys_of(std::span<const std::int64_t> end, std::int64_t begin, std::int64_t stop,
             std::int32_t block) {
  const auto tokens = static_cast<std::int64_t>(end.size());
  Keys keys{block, tokens, 0};
  bool good = true;
  for (std::int64_t k = begin; k < stop; ++k) {
    keys.first = std::min(keys.first, end[k]);
    keys.last = std::max(keys.last, end[k]);
    good &= end[k] > k && end[k] <= tokens;
  }
  for (std::int64_t k = begin; k < stop && !good; ++k)
    PYRL_CHECK(end[k] > k && end[k] <= tokens, "block_mask: expected an end from ", k + 1, " to ",
               tokens, " for token ", k, ", got ", end[k]);
  return keys;
}

}  // namespace

BlockMask block_mask(std::span<const std::int64_t> end, std::int64_t block) {
  PYRL_CHECK(block >= 2, "block_mask: expected blocks of at least 2 tokens, got ", block);
  const auto tokens = static_cast<std::int64_t>(end.size());
  const std::int64_t blocks = (tokens + block - 1) / block;
  const std::size_t rows = blocks, cells = rows * rows;
  BlockMask mask;
  mask.columns = Columns<std::int32_t>({{&mask.partial_count, rows},
                                        {&mask.full_count, rows},
                                        {&mask.partial, cells},
                                        {&mask.full, cells}});
  std::vector<Keys> seen;  // by some query of the row or of a later one, as far as is known
  for (std::int64_t q = 0; q < blocks; ++q) {
    const std::int64_t begin = q * block, stop = std::min(begin + block, tokens);
    // The rows past the last token of a block that is not whole count as unseen, as in torch.
    const bool whole = stop == begin + block;
    std::int32_t* const partial = mask.partial.data() + q * blocks;
    std::int32_t* const full = mask.full.data() + q * blocks;
    std::int32_t partials = 0, fulls = 0;
    std::size_t kept = 0;
    for (const Keys& keys : seen) {
      if (keys.last <= begin) continue;
      if (whole && keys.first >= stop)
        full[fulls++] = keys.block;
      else
        partial[partials++] = keys.block;
      seen[kept++] = keys;
    }
    seen.resize(kept);
    seen.push_back(keys_of(end, begin, stop, static_cast<std::int32_t>(q)));
    partial[partials++] = seen.back().block;
    std::fill(partial + partials, partial + blocks, 0);
    std::fill(full + fulls, full + blocks, 0);
    mask.partial_count[q] = partials;
    mask.full_count[q] = fulls;
  }
  return mask;
}

}  // namespace pyrl::tree
