#include "tree/pack_tree.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/check.h"

namespace pyrl::tree {
namespace {

constexpr std::int64_t kRoot = -1;

// Tokens that every row through their last one has in common.
struct Node {
  std::int64_t parent = kRoot;
  std::int64_t depth = 0;  // position of its first token
  std::int64_t length = 0;
  std::int64_t source = 0;  // of its tokens: an index into those of all rows, or a leaf below it

  std::int64_t end() const { return depth + length; }
};

// Nodes depth first, the node that each row ends with, and each row's length and prompt.
struct Tree {
  std::vector<Node> node;
  std::vector<std::int64_t> last, length, prompt;  // [N]
};

// How many tokens two rows have in common from their first one on.
std::int64_t in_common(const std::int64_t* a, const std::int64_t* b, std::int64_t most) {
  constexpr std::int64_t kAtOnce = 256;
  std::int64_t i = 0;
  while (i + kAtOnce <= most && std::memcmp(a + i, b + i, kAtOnce * sizeof(*a)) == 0) i += kAtOnce;
  return std::mismatch(a + i, a + most, b + i).first - a;
}

// The rows as a radix tree, built row by row. A split leaves the lower part its index, so that rows
// that end there need no update.
class Radix {
 public:
  Radix(std::span<const std::int64_t> token, bool share) : token_(token), share_(share) {}

  std::int64_t insert(std::int64_t begin, std::int64_t end) {
    std::int64_t at = kRoot;
    for (std::int64_t i = begin; i < end;) {
      const auto found = share_ ? child_.find(key(at, i)) : child_.end();
      if (found == child_.end())
        return add({.parent = at, .depth = i - begin, .length = end - i, .source = i});
      const Node& known = node_[found->second];
      const std::int64_t most = std::min(known.length, end - i);
      const std::int64_t common = in_common(&token_[known.source], &token_[i], most);
      at = common < known.length ? split(found->second, common) : found->second;
      i += common;
    }
    return at;
  }

  // Depth first, children in the order of their first rows; `last` is renumbered.
  std::vector<Node> take(std::vector<std::int64_t>& last) {
    std::vector<std::int64_t> stack(roots_.rbegin(), roots_.rend()), ordinal(node_.size());
    std::vector<Node> ordered;
    ordered.reserve(node_.size());
    while (!stack.empty()) {
      const std::int64_t index = stack.back();
      stack.pop_back();
      ordinal[index] = static_cast<std::int64_t>(ordered.size());
      ordered.push_back(node_[index]);
      if (node_[index].parent != kRoot) ordered.back().parent = ordinal[node_[index].parent];
      stack.insert(stack.end(), children_[index].rbegin(), children_[index].rend());
    }
    for (std::int64_t& node : last) node = ordinal[node];
    return ordered;
  }

 private:
  std::uint64_t key(std::int64_t node, std::int64_t source) const {
    return static_cast<std::uint64_t>(node + 1) << 32 | static_cast<std::uint64_t>(token_[source]);
  }

  std::vector<std::int64_t>& below(std::int64_t node) {
    return node == kRoot ? roots_ : children_[node];
  }

  std::int64_t add(const Node& node) {
    const auto index = static_cast<std::int64_t>(node_.size());
    node_.push_back(node);
    children_.emplace_back();
    below(node.parent).push_back(index);
    child_[key(node.parent, node.source)] = index;
    return index;
  }

  std::int64_t split(std::int64_t lower, std::int64_t at) {
    const auto upper = static_cast<std::int64_t>(node_.size());
    const Node whole = node_[lower];
    node_.push_back({whole.parent, whole.depth, at, whole.source});
    children_.push_back({lower});
    std::vector<std::int64_t>& siblings = below(whole.parent);
    *std::find(siblings.begin(), siblings.end(), lower) = upper;
    child_[key(whole.parent, whole.source)] = upper;
    node_[lower] = {upper, whole.depth + at, whole.length - at, whole.source + at};
    child_[key(upper, whole.source + at)] = lower;
    return upper;
  }

  const std::span<const std::int64_t> token_;
  const bool share_;
  std::vector<Node> node_;
  std::vector<std::vector<std::int64_t>> children_;
  std::vector<std::int64_t> roots_;
  std::unordered_map<std::uint64_t, std::int64_t> child_;
};

// What is known of a node before the columns are written.
struct Place {
  bool inner = false;               // some row goes beyond it
  std::int64_t input = 0, end = 0;  // its first input, and one past the last at or below it
  std::int64_t unique = 0;          // its first response token
  std::int64_t response = std::numeric_limits<std::int64_t>::max();  // the position of that token
};

class Layout {
 public:
  explicit Layout(const Tree& tree) : tree_(tree), place_(tree.node.size()) {
    for (std::size_t n = 0; n < tree.last.size(); ++n)
      lower(place_[tree.last[n]].response, tree.prompt[n]);
    for (std::size_t i = place_.size(); i-- > 0;) {
      const std::int64_t parent = tree.node[i].parent;
      if (parent == kRoot) continue;
      place_[parent].inner = true;
      lower(place_[parent].response, place_[i].response);
    }
    make_room();
    for (std::size_t i = place_.size(); i-- > 0;) {
      const std::int64_t parent = tree.node[i].parent;
      if (parent != kRoot) place_[parent].end = std::max(place_[parent].end, place_[i].end);
    }
  }

  // `copy` writes the tokens of a node.
  template <typename Copy>
  PackedTree pack(Copy copy) {
    for (std::size_t i = 0; i < place_.size(); ++i) {
      // A last token that is no input stands in the place of the next node's first one meanwhile.
      std::int64_t* token = out_.input.data() + place_[i].input;
      copy(tree_.node[i], token);
      label(i, token);
    }
    segments();
    rows();
    return std::move(out_);
  }

 private:
  static void lower(std::int64_t& value, std::int64_t bound) { value = std::min(value, bound); }

  void make_room() {
    std::size_t inputs = 0, labels = 0, segments = 0, tokens = 0;
    for (std::size_t i = 0; i < place_.size(); ++i) {
      const Node& node = tree_.node[i];
      Place& place = place_[i];
      place.input = static_cast<std::int64_t>(inputs);
      place.end = place.input + node.length - (place.inner ? 0 : 1);
      place.unique = static_cast<std::int64_t>(labels);
      place.response = std::clamp(place.response, node.depth, node.end());
      inputs = static_cast<std::size_t>(place.end);
      labels += static_cast<std::size_t>(node.end() - place.response);
      segments += place.end > place.input;
    }
    const std::size_t rows = tree_.last.size();
    for (std::size_t n = 0; n < rows; ++n)
      tokens += static_cast<std::size_t>(tree_.length[n] - tree_.prompt[n]);
    std::span<std::int64_t> spare;
    out_.columns = Columns<std::int64_t>({{&out_.input, inputs},
                                          {&spare, 1},
                                          {&out_.position, inputs},
                                          {&out_.begin, segments},
                                          {&out_.end, segments},
                                          {&out_.parent, segments},
                                          {&out_.predictor, labels},
                                          {&out_.label, labels},
                                          {&out_.unique, tokens},
                                          {&out_.order, rows},
                                          {&out_.added, rows}});
  }

  void label(std::size_t i, const std::int64_t* token) {
    const Node& node = tree_.node[i];
    const Place& place = place_[i];
    const std::int64_t first = place.response - node.depth;
    std::copy(token + first, token + node.length, out_.label.begin() + place.unique);
    if (first == node.length) return;
    std::int64_t* predictor = out_.predictor.data() + place.unique;
    std::iota(predictor, predictor + (node.length - first), place.input + first - 1);
    // Children that came before this one lie between its first token and its parent's last.
    if (first == 0) *predictor = place_[node.parent].input + tree_.node[node.parent].length - 1;
  }

  void segments() {
    std::vector<std::int64_t> ordinal(place_.size(), kRoot);
    std::int64_t s = 0;
    for (std::size_t i = 0; i < place_.size(); ++i) {
      const Node& node = tree_.node[i];
      const Place& place = place_[i];
      if (place.input == place.end) continue;
      ordinal[i] = s;
      out_.begin[s] = place.input;
      out_.end[s] = place.end;
      out_.parent[s++] = node.parent == kRoot ? kRoot : ordinal[node.parent];
      std::int64_t* position = out_.position.data() + place.input;
      std::iota(position, position + (node.length - (place.inner ? 0 : 1)), node.depth);
    }
  }

  void rows() {
    std::int64_t* unique = out_.unique.data();
    for (std::size_t n = 0; n < tree_.last.size(); ++n) {
      std::int64_t* const begin = unique - tree_.prompt[n];  // of the token at position 0
      unique += tree_.length[n] - tree_.prompt[n];
      for (std::int64_t i = tree_.last[n], stop = tree_.length[n]; stop > tree_.prompt[n];
           i = tree_.node[i].parent) {
        const std::int64_t from = std::max(tree_.node[i].depth, tree_.prompt[n]);
        std::iota(begin + from, begin + stop, place_[i].unique + from - place_[i].response);
        stop = from;
      }
    }
    std::iota(out_.order.begin(), out_.order.end(), 0);
    std::stable_sort(out_.order.begin(), out_.order.end(),
                     [&](std::int64_t a, std::int64_t b) { return tree_.last[a] < tree_.last[b]; });
    std::vector<bool> seen(place_.size());
    for (const std::int64_t n : out_.order) {
      out_.added[n] = 0;
      for (std::int64_t i = tree_.last[n]; i != kRoot && !seen[i]; i = tree_.node[i].parent) {
        seen[i] = true;
        out_.added[n] += tree_.node[i].length;
      }
    }
  }

  const Tree& tree_;
  std::vector<Place> place_;
  PackedTree out_;
};

void check_rows(std::span<const std::int64_t> token, std::span<const std::int64_t> offset,
                std::span<const std::int64_t> prompt) {
  PYRL_CHECK(offset.size() == prompt.size() + 1, "pack_rows: expected ", prompt.size() + 1,
             " offsets, one more than prompts, got ", offset.size());
  const auto tokens = static_cast<std::int64_t>(token.size());
  PYRL_CHECK(offset.front() == 0 && offset.back() == tokens,
             "pack_rows: expected offsets from 0 to ", tokens, ", got ", offset.front(), " and ",
             offset.back());
  for (std::size_t n = 0; n < prompt.size(); ++n)
    PYRL_CHECK(prompt[n] >= 1 && prompt[n] <= offset[n + 1] - offset[n],
               "pack_rows: expected a prompt of 1 to ", offset[n + 1] - offset[n],
               " tokens, the length of row ", n, ", got ", prompt[n]);
  std::uint64_t bits = 0;
  for (const std::int64_t id : token) bits |= static_cast<std::uint64_t>(id);
  if (bits <= std::numeric_limits<std::int32_t>::max()) return;
  for (std::size_t i = 0; i < token.size(); ++i)
    PYRL_CHECK(token[i] >= 0 && token[i] <= std::numeric_limits<std::int32_t>::max(),
               "pack_rows: expected token ids from 0 to 2^31 - 1, got ", token[i], " at ", i);
}

// The nodes of a forest's segments; `leaf_segment` becomes the node that each leaf ends with.
std::vector<Node> nodes_of(const Segments& segments, std::vector<std::int64_t>& leaf_segment) {
  std::vector<Node> found;
  std::vector<std::int64_t> node(segments.length.size());
  for (std::size_t s = 0; s < node.size(); ++s) {
    const std::int64_t above = segments.parent[s];
    const std::int64_t parent = above == kRoot ? kRoot : node[above];
    node[s] = parent;
    // A branch that added nothing ends where its parent does.
    if (segments.length[s] == 0) continue;
    node[s] = static_cast<std::int64_t>(found.size());
    const std::int64_t depth = parent == kRoot ? 0 : found[parent].end();
    found.push_back({.parent = parent, .depth = depth, .length = segments.length[s]});
  }
  for (std::int64_t& s : leaf_segment) s = node[s];
  return found;
}

// Tokens of a node of a forest, which counts positions from the end of the prompt.
void copy_tokens(const Forest& forest, const Node& node, std::int64_t* out) {
  const std::span<const std::int32_t> prompt = forest.prompt(forest.tree_of(node.source));
  const auto above = std::ssize(prompt);
  if (node.depth < above) {
    std::copy(prompt.begin(), prompt.end(), out);
    return;
  }
  forest.read(node.source, static_cast<std::uint32_t>(node.depth - above),
              static_cast<std::uint32_t>(node.end() - above),
              [&](std::uint32_t, std::span<const TokenRecord> records) {
                for (const TokenRecord& record : records) *out++ = record.id & ~kForcedBit;
              });
}

}  // namespace

PackedTree pack_rows(std::span<const std::int64_t> token, std::span<const std::int64_t> offset,
                     std::span<const std::int64_t> prompt, bool share) {
  check_rows(token, offset, prompt);
  Tree tree;
  Radix radix(token, share);
  tree.prompt.assign(prompt.begin(), prompt.end());
  for (std::size_t n = 0; n < prompt.size(); ++n) {
    tree.length.push_back(offset[n + 1] - offset[n]);
    tree.last.push_back(radix.insert(offset[n], offset[n + 1]));
  }
  tree.node = radix.take(tree.last);
  return Layout(tree).pack([&](const Node& node, std::int64_t* out) {
    std::copy_n(token.begin() + node.source, node.length, out);
  });
}

PackedTree pack_tree(const Forest& forest, std::span<const std::int64_t> leaf) {
  Segments segments = forest.segments(leaf);
  Tree tree;
  tree.node = nodes_of(segments, segments.leaf_segment);
  tree.last = std::move(segments.leaf_segment);
  for (std::size_t n = 0; n < leaf.size(); ++n) {
    tree.prompt.push_back(std::ssize(forest.prompt(forest.tree_of(leaf[n]))));
    tree.length.push_back(tree.prompt.back() + forest.length(leaf[n]));
    for (std::int64_t i = tree.last[n]; i != kRoot; i = tree.node[i].parent)
      tree.node[i].source = leaf[n];
  }
  return Layout(tree).pack(
      [&](const Node& node, std::int64_t* out) { copy_tokens(forest, node, out); });
}

}  // namespace pyrl::tree
