#include "tree/pack_tree.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <unordered_map>

#include "base/check.h"

namespace pyrl::tree {
namespace {

constexpr std::int64_t kRoot = -1;

// Tokens that every row through their last one has in common.
struct Node {
  std::int64_t parent = kRoot;
  std::span<const std::int64_t> token;
  std::int64_t depth = 0;  // position of its first token

  std::int64_t end() const { return depth + std::ssize(token); }
};

// Nodes depth first, the node that each row ends with, and each row's length and prompt.
struct Tree {
  std::vector<Node> node;
  std::vector<std::int64_t> last, length, prompt;  // [N]
};

// The rows as a radix tree, built row by row. A split leaves the lower part its index, so that rows
// that end there need no update.
class Radix {
 public:
  explicit Radix(bool share) : share_(share) {}

  std::int64_t insert(std::span<const std::int64_t> row) {
    std::int64_t at = kRoot;
    for (std::size_t depth = 0; depth < row.size();) {
      const std::span<const std::int64_t> rest = row.subspan(depth);
      const auto found = share_ ? child_.find(key(at, rest[0])) : child_.end();
      if (found == child_.end()) return add(at, rest, static_cast<std::int64_t>(depth));
      const std::span<const std::int64_t> known = node_[found->second].token;
      const std::size_t most = std::min(known.size(), rest.size());
      const auto differ = std::mismatch(known.begin(), known.begin() + most, rest.begin());
      const std::size_t common = differ.first - known.begin();
      at = common < known.size() ? split(found->second, common) : found->second;
      depth += common;
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
  static std::uint64_t key(std::int64_t node, std::int64_t token) {
    return static_cast<std::uint64_t>(node + 1) << 32 | static_cast<std::uint64_t>(token);
  }

  std::vector<std::int64_t>& below(std::int64_t node) {
    return node == kRoot ? roots_ : children_[node];
  }

  std::int64_t add(std::int64_t parent, std::span<const std::int64_t> token, std::int64_t depth) {
    const auto index = static_cast<std::int64_t>(node_.size());
    node_.push_back({parent, token, depth});
    children_.emplace_back();
    below(parent).push_back(index);
    child_[key(parent, token[0])] = index;
    return index;
  }

  std::int64_t split(std::int64_t lower, std::size_t at) {
    const auto upper = static_cast<std::int64_t>(node_.size());
    const Node whole = node_[lower];
    node_.push_back({whole.parent, whole.token.first(at), whole.depth});
    children_.push_back({lower});
    std::vector<std::int64_t>& siblings = below(whole.parent);
    *std::find(siblings.begin(), siblings.end(), lower) = upper;
    child_[key(whole.parent, whole.token[0])] = upper;
    node_[lower] = {upper, whole.token.subspan(at), whole.depth + static_cast<std::int64_t>(at)};
    child_[key(upper, whole.token[at])] = lower;
    return upper;
  }

  const bool share_;
  std::vector<Node> node_;
  std::vector<std::vector<std::int64_t>> children_;
  std::vector<std::int64_t> roots_;
  std::unordered_map<std::uint64_t, std::int64_t> child_;
};

// What is known of a node when the inputs are laid out.
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
    for (std::size_t i = tree.node.size(); i-- > 0;) {
      const std::int64_t parent = tree.node[i].parent;
      if (parent == kRoot) continue;
      place_[parent].inner = true;
      lower(place_[parent].response, place_[i].response);
    }
  }

  PackedTree pack() {
    std::size_t tokens = 0;
    for (const Node& node : tree_.node) tokens += node.token.size();
    for (auto* column : {&out_.input, &out_.position, &out_.predictor, &out_.label})
      column->reserve(tokens);
    for (std::size_t i = 0; i < place_.size(); ++i) lay(i);
    segments();
    rows();
    return std::move(out_);
  }

 private:
  static void lower(std::int64_t& value, std::int64_t bound) { value = std::min(value, bound); }

  void lay(std::size_t i) {
    const Node& node = tree_.node[i];
    Place& place = place_[i];
    const auto length = static_cast<std::int64_t>(node.token.size());
    place.input = static_cast<std::int64_t>(out_.input.size());
    place.end = place.input + length - (place.inner ? 0 : 1);
    out_.input.insert(out_.input.end(), node.token.begin(),
                      node.token.begin() + (place.end - place.input));
    out_.position.resize(out_.input.size());
    std::iota(out_.position.begin() + place.input, out_.position.end(), node.depth);

    place.response = std::max(place.response, node.depth);
    place.unique = static_cast<std::int64_t>(out_.label.size());
    const std::int64_t first = std::min(place.response - node.depth, length);
    out_.label.insert(out_.label.end(), node.token.begin() + first, node.token.end());
    out_.predictor.resize(out_.label.size());
    if (first == length) return;
    std::iota(out_.predictor.begin() + place.unique, out_.predictor.end(), place.input + first - 1);
    // Children that came before this one lie between its first token and its parent's last.
    if (first == 0) out_.predictor[place.unique] = own_end(node.parent) - 1;
  }

  std::int64_t own_end(std::int64_t inner) const {
    return place_[inner].input + static_cast<std::int64_t>(tree_.node[inner].token.size());
  }

  void segments() {
    std::vector<std::int64_t> ordinal(place_.size(), kRoot);
    for (std::size_t i = place_.size(); i-- > 0;) {
      const std::int64_t parent = tree_.node[i].parent;
      if (parent != kRoot) place_[parent].end = std::max(place_[parent].end, place_[i].end);
    }
    for (std::size_t i = 0; i < place_.size(); ++i) {
      const Place& place = place_[i];
      if (place.input == place.end) continue;
      const std::int64_t parent = tree_.node[i].parent;
      ordinal[i] = static_cast<std::int64_t>(out_.begin.size());
      out_.begin.push_back(place.input);
      out_.end.push_back(place.end);
      out_.parent.push_back(parent == kRoot ? kRoot : ordinal[parent]);
    }
  }

  void rows() {
    std::size_t tokens = 0;
    for (std::size_t n = 0; n < tree_.last.size(); ++n) {
      tokens += static_cast<std::size_t>(tree_.length[n] - tree_.prompt[n]);
      out_.unique.resize(tokens);
      auto unique = out_.unique.end();
      for (std::int64_t i = tree_.last[n], stop = tree_.length[n]; stop > tree_.prompt[n];
           i = tree_.node[i].parent) {
        const std::int64_t from = std::max(tree_.node[i].depth, tree_.prompt[n]);
        unique -= stop - from;
        std::iota(unique, unique + (stop - from), place_[i].unique + from - place_[i].response);
        stop = from;
      }
    }
    out_.order.resize(tree_.last.size());
    std::iota(out_.order.begin(), out_.order.end(), 0);
    std::stable_sort(out_.order.begin(), out_.order.end(),
                     [&](std::int64_t a, std::int64_t b) { return tree_.last[a] < tree_.last[b]; });
    std::vector<bool> seen(place_.size());
    out_.added.resize(out_.order.size());
    for (const std::int64_t n : out_.order)
      for (std::int64_t i = tree_.last[n]; i != kRoot && !seen[i]; i = tree_.node[i].parent) {
        seen[i] = true;
        out_.added[n] += static_cast<std::int64_t>(tree_.node[i].token.size());
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
  for (std::size_t i = 0; i < token.size(); ++i)
    PYRL_CHECK(token[i] >= 0 && token[i] <= std::numeric_limits<std::int32_t>::max(),
               "pack_rows: expected token ids from 0 to 2^31 - 1, got ", token[i], " at ", i);
}

// The response tokens of each segment, and the prompts, one after the other from `begin`.
std::vector<std::int64_t> tokens_of(const Forest& forest, std::span<const std::int64_t> leaf,
                                    const Segments& segments, std::span<const std::int64_t> begin) {
  std::vector<std::int64_t> token(begin.back());
  std::vector<bool> filled(segments.length.size());
  for (std::size_t n = 0; n < leaf.size(); ++n) {
    std::int64_t position = 0;
    for (std::int64_t e = segments.entry_offset[n]; e < segments.entry_offset[n + 1]; ++e) {
      const std::int64_t s = segments.entry_segment[e], from = position;
      position += segments.length[s];
      if (filled[s]) continue;
      filled[s] = true;
      auto* out = token.data() + begin[s];
      forest.read(leaf[n], static_cast<std::uint32_t>(from), static_cast<std::uint32_t>(position),
                  [&](std::uint32_t, std::span<const TokenRecord> records) {
                    for (const TokenRecord& record : records) *out++ = record.id & ~kForcedBit;
                  });
    }
  }
  for (std::size_t s = 0; s < segments.length.size(); ++s) {
    if (segments.parent[s] != kRoot) continue;
    const auto prompt = forest.prompt(segments.tree[s]);
    std::copy(prompt.begin(), prompt.end(), token.begin() + begin[s]);
  }
  return token;
}

}  // namespace

PackedTree pack_rows(std::span<const std::int64_t> token, std::span<const std::int64_t> offset,
                     std::span<const std::int64_t> prompt, bool share) {
  check_rows(token, offset, prompt);
  Tree tree;
  Radix radix(share);
  tree.prompt.assign(prompt.begin(), prompt.end());
  for (std::size_t n = 0; n < prompt.size(); ++n) {
    tree.length.push_back(offset[n + 1] - offset[n]);
    tree.last.push_back(radix.insert(token.subspan(offset[n], tree.length.back())));
  }
  tree.node = radix.take(tree.last);
  return Layout(tree).pack();
}

PackedTree pack_tree(const Forest& forest, std::span<const std::int64_t> leaf) {
  const Segments segments = forest.segments(leaf);
  std::vector<std::int64_t> begin(segments.length.size() + 1), node(segments.length.size());
  std::partial_sum(segments.length.begin(), segments.length.end(), begin.begin() + 1);
  const std::vector<std::int64_t> token = tokens_of(forest, leaf, segments, begin);
  Tree tree;
  for (std::size_t s = 0; s < segments.length.size(); ++s) {
    const bool root = segments.parent[s] == kRoot;
    const std::int64_t parent = root ? kRoot : node[segments.parent[s]];
    if (segments.length[s] == 0) {  // a branch that added nothing ends where its parent does
      node[s] = parent;
      continue;
    }
    const std::int64_t depth = root ? 0 : tree.node[parent].end();
    node[s] = static_cast<std::int64_t>(tree.node.size());
    tree.node.push_back({parent, std::span(token).subspan(begin[s], segments.length[s]), depth});
  }
  for (std::size_t n = 0; n < leaf.size(); ++n) {
    tree.prompt.push_back(std::ssize(forest.prompt(forest.tree_of(leaf[n]))));
    tree.length.push_back(tree.prompt.back() + forest.length(leaf[n]));
    tree.last.push_back(node[segments.leaf_segment[n]]);
  }
  return Layout(tree).pack();
}

}  // namespace pyrl::tree
