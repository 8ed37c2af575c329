// Rows as a tree: a prefix that rows share is stored, and read by the model, once.
#pragma once

#include <cstdint>
#include <span>

#include "tree/columns.h"
#include "tree/forest.h"

namespace pyrl::tree {

// J input tokens, depth first, parents before children; S segments of them; U response tokens that
// differ in their place in the tree; T response tokens of all rows, row by row. The last token of a
// row that no other row goes beyond predicts nothing: it is a label, not an input.
struct PackedTree {
  Columns<std::int64_t> columns;
  std::span<std::int64_t> input, position;     // [J] position: tokens above, the prompt's included
  std::span<std::int64_t> begin, end, parent;  // [S] inputs from `begin`, and all below, to `end`
  std::span<std::int64_t> predictor, label;    // [U] the input before a token, and the token
  std::span<std::int64_t> unique;              // [T] which of U
  std::span<std::int64_t> order, added;        // [N] rows depth first; tokens that each adds
};

// `token` holds N rows, row n in [offset[n], offset[n + 1]), of which the first `prompt[n]` tokens
// are its prompt. Rows share what they have in common from their first token on, whatever question
// they belong to; without `share` each is a tree of its own.
PackedTree pack_rows(std::span<const std::int64_t> token, std::span<const std::int64_t> offset,
                     std::span<const std::int64_t> prompt, bool share);

// The leaves of a forest share what the forest stores once.
PackedTree pack_tree(const Forest& forest, std::span<const std::int64_t> leaf);

// Which blocks of keys each block of queries attends to: `block` tokens on a side, B blocks. A
// partial block needs the mask "k <= q < end of k", a full one none. Rows of [B, B] begin with the
// indices that count, ascending, and go on with zeros: FlexAttention's kernels also read some of
// those, which they do not use.
struct BlockMask {
  Columns<std::int32_t> columns;
  std::span<std::int32_t> partial_count, full_count;  // [B]
  std::span<std::int32_t> partial, full;              // [B * B]
};

BlockMask block_mask(std::span<const std::int64_t> end, std::int64_t block);

}  // namespace pyrl::tree
