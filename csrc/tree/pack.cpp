#include "tree/pack.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/check.h"

namespace pyrl::tree {
namespace {

template <typename To, typename From>
void extend(std::vector<To>& to, const std::vector<From>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

void append_leaf(PackedRows& rows, std::span<const std::int32_t> prompt, const Path& path,
                 std::int64_t leaf) {
  const std::size_t length = path.tokens.size();
  rows.input.insert(rows.input.end(), prompt.begin(), prompt.end());
  extend(rows.input, path.tokens);
  PYRL_CHECK(rows.input.size() <= std::numeric_limits<std::int32_t>::max(),
             "pack_flat: expected fewer than 2^31 tokens in one pack");
  rows.cu_seqlens.push_back(static_cast<std::int32_t>(rows.input.size()));
  rows.position.resize(rows.input.size());
  std::iota(rows.position.end() - static_cast<std::ptrdiff_t>(prompt.size() + length),
            rows.position.end(), 0);
  rows.leaf.resize(rows.leaf.size() + length, leaf);
  extend(rows.label, path.tokens);
  extend(rows.logprob, path.logprob);
  extend(rows.entropy, path.entropy);
  extend(rows.confidence, path.confidence);
  extend(rows.forced, path.forced);
}

}  // namespace

PackedRows pack_flat(const Forest& forest, std::span<const std::int64_t> leaf) {
  PackedRows rows;
  rows.cu_seqlens.push_back(0);
  for (std::size_t n = 0; n < leaf.size(); ++n)
    append_leaf(rows, forest.prompt(forest.tree_of(leaf[n])), forest.path(leaf[n]),
                static_cast<std::int64_t>(n));
  const Segments segments = forest.segments(leaf);
  rows.segment.reserve(rows.label.size());
  for (std::size_t e = 0; e < segments.entry_segment.size(); ++e)
    rows.segment.insert(rows.segment.end(), static_cast<std::size_t>(segments.entry_length[e]),
                        segments.entry_segment[e]);
  return rows;
}

}  // namespace pyrl::tree
