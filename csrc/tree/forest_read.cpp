// What a forest tells: paths, leaves, and the tree above a set of leaves.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/check.h"
#include "tree/forest.h"

namespace pyrl::tree {

std::vector<Forest::Piece> Forest::pieces(std::int64_t branch, std::uint32_t begin,
                                          std::uint32_t end) const {
  std::vector<Piece> found;
  std::int32_t index = live(branch).segment;
  for (; segments_[index].run != kNone; index = segments_[index].parent) {
    const Segment& segment = segments_[index];
    const Piece piece{segment.run, std::max(begin, segment.begin), std::min(end, end_of(segment))};
    if (piece.begin < piece.end) found.push_back(piece);
    if (segment.begin <= begin) break;
  }
  std::reverse(found.begin(), found.end());
  return found;
}

void Forest::copy_versions(const Piece& piece, std::int32_t* out) const {
  for (auto step = runs_[piece.run].steps.rbegin(); step->position >= piece.end;) ++step;
  const std::vector<VersionStep>& steps = runs_[piece.run].steps;
  std::uint32_t end = piece.end;
  for (auto step = steps.rbegin(); end > piece.begin; ++step) {
    const std::uint32_t begin = std::max(step->position, piece.begin);
    if (begin < end) {
      std::fill(out + (begin - piece.begin), out + (end - piece.begin), step->version);
      end = begin;
    }
  }
}

Path Forest::path(std::int64_t branch) const {
  const std::uint32_t length = live(branch).length;
  Path path;
  path.tokens.resize(length);
  path.forced.resize(length);
  path.version.resize(length);
  for (auto* column : {&path.logprob, &path.entropy, &path.confidence}) column->resize(length);
  const auto copy = [&](std::uint32_t position, std::span<const TokenRecord> records) {
    for (const TokenRecord& record : records) {
      path.tokens[position] = static_cast<std::int32_t>(record.id & ~kForcedBit);
      path.forced[position] = (record.id & kForcedBit) != 0;
      path.logprob[position] = record.logprob;
      path.entropy[position] = record.entropy;
      path.confidence[position] = record.confidence;
      ++position;
    }
  };
  for (const Piece& piece : pieces(branch, 0, length)) {
    read_piece(piece, copy);
    copy_versions(piece, path.version.data() + piece.begin);
  }
  return path;
}

void Forest::append_leaves(const Tree& tree, std::vector<std::int64_t>& out) const {
  for (std::int32_t i = tree.branches.first; i != kNone; i = branches_[i].in_tree.next)
    if (branches_[i].state != State::kOpen) out.push_back(handle(i, branches_[i]));
}

std::vector<std::int64_t> Forest::leaves(std::int64_t tree) const {
  std::vector<std::int64_t> found;
  append_leaves(at_tree(tree), found);
  return found;
}

std::vector<std::int64_t> Forest::leaves() const {
  std::vector<std::int64_t> found;
  for (const Tree& tree : trees_) append_leaves(tree, found);
  return found;
}

std::vector<std::int64_t> Forest::open() const {
  std::vector<std::int64_t> found;
  for (std::int32_t i = open_.first; i != kNone; i = branches_[i].in_open.next)
    found.push_back(handle(i, branches_[i]));
  return found;
}

double Forest::mean(std::int64_t branch, std::uint32_t begin, float TokenRecord::* field) const {
  const std::uint32_t end = live(branch).length;
  double sum = 0;
  read(branch, begin, end, [&](std::uint32_t, std::span<const TokenRecord> records) {
    for (const TokenRecord& record : records) sum += record.*field;
  });
  return end > begin ? sum / (end - begin) : std::numeric_limits<double>::quiet_NaN();
}

LeafTable Forest::leaf_table(std::span<const std::int64_t> leaf) const {
  LeafTable table;
  for (const std::int64_t id : leaf) {
    const Branch& branch = live(id);
    std::int64_t forks = -1;  // the leaf's own segment is no fork
    for (std::int32_t s = branch.segment; segments_[s].run != kNone; s = segments_[s].parent)
      ++forks;
    table.tree.push_back(branch.tree);
    table.trunk.push_back(branch.trunk);
    table.length.push_back(branch.length);
    table.depth.push_back(forks);
    table.finish.push_back(static_cast<std::uint8_t>(branch.state));
    table.weight.push_back(branch.weight);
    table.log_mass.push_back(branch.standing.log_mass);
    table.mean_entropy.push_back(mean(id, 0, &TokenRecord::entropy));
  }
  return table;
}

std::vector<double> Forest::tail_confidence(std::span<const std::int64_t> leaf,
                                            std::int64_t window) const {
  PYRL_CHECK(window >= 1, "tail_confidence: expected a window of at least 1 token, got ", window);
  std::vector<double> tail;
  for (const std::int64_t id : leaf) {
    const std::int64_t begin = std::max<std::int64_t>(0, length(id) - window);
    tail.push_back(mean(id, static_cast<std::uint32_t>(begin), &TokenRecord::confidence));
  }
  return tail;
}

std::vector<std::int64_t> Forest::top_entropy(std::int64_t branch, std::int64_t n,
                                              std::int64_t begin, std::int64_t end,
                                              std::int64_t min_gap) const {
  PYRL_CHECK(n >= 0, "top_entropy: expected n >= 0, got ", n);
  PYRL_CHECK(min_gap >= 0, "top_entropy: expected min_gap >= 0, got ", min_gap);
  PYRL_CHECK(begin >= 0 && begin <= end && end <= length(branch),
             "top_entropy: expected 0 <= begin <= end <= ", length(branch), ", got ", begin,
             " and ", end);
  std::vector<float> entropy;
  read(branch, static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(end),
       [&](std::uint32_t, std::span<const TokenRecord> records) {
         for (const TokenRecord& record : records) entropy.push_back(record.entropy);
       });
  const auto size = static_cast<std::int64_t>(entropy.size());
  for (std::int64_t i = 0; i < size; ++i)
    PYRL_CHECK(!std::isnan(entropy[i]), "top_entropy: entropy is NaN at position ", begin + i);
  std::vector<std::int64_t> order(entropy.size()), chosen;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return entropy[a] > entropy[b]; });
  std::vector<bool> near(entropy.size());
  for (const std::int64_t i : order) {
    if (static_cast<std::int64_t>(chosen.size()) == n) break;
    if (near[i]) continue;
    chosen.push_back(begin + i);
    const std::int64_t first = i - std::min(i, std::max<std::int64_t>(min_gap, 1) - 1);
    const std::int64_t last = i + std::min(size - i, std::max<std::int64_t>(min_gap, 1));
    std::fill(near.begin() + first, near.begin() + last, true);
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

// For each segment, how many of these leaves are at or below it.
std::vector<std::int64_t> Forest::count_below(std::span<const std::int64_t> leaf) const {
  std::vector<std::int64_t> below(segments_.items.size());
  std::vector<bool> seen(branches_.items.size());
  for (const std::int64_t id : leaf) {
    const std::int32_t index = index_of(id);
    PYRL_CHECK(!seen[index], "segments: expected distinct leaves, got ", id, " twice");
    seen[index] = true;
    for (std::int32_t s = branches_[index].segment; s != kNone; s = segments_[s].parent) ++below[s];
  }
  return below;
}

// The segment after this one in depth-first order, kNone after the last one of its tree.
std::int32_t Forest::next_preorder(std::int32_t segment, bool skip_children) const {
  if (!skip_children && segments_[segment].children.first != kNone)
    return segments_[segment].children.first;
  while (segment != kNone && segments_[segment].sibling.next == kNone)
    segment = segments_[segment].parent;
  return segment == kNone ? kNone : segments_[segment].sibling.next;
}

Segments Forest::segments(std::span<const std::int64_t> leaf) const {
  const std::vector<std::int64_t> below = count_below(leaf);
  std::vector<std::int64_t> ordinal(below.size(), kNone);
  Segments out;
  for (std::size_t tree = 0; tree < trees_.size(); ++tree) {
    std::int32_t s = trees_[tree].root;
    for (; s != kNone; s = next_preorder(s, below[s] == 0)) {
      if (below[s] == 0) continue;
      const bool root = segments_[s].run == kNone;
      const std::int64_t parent = root ? kNone : ordinal[segments_[s].parent];
      const auto length = static_cast<std::int64_t>(
          root ? trees_[tree].prompt.size() : end_of(segments_[s]) - segments_[s].begin);
      // A fork of which only one side leads to these leaves is none: both parts are one segment.
      if (!root && out.parent[parent] != kNone && out.leaves[parent] == below[s]) {
        out.length[parent] += length;
        ordinal[s] = parent;
        continue;
      }
      ordinal[s] = static_cast<std::int64_t>(out.parent.size());
      out.parent.push_back(parent);
      out.tree.push_back(static_cast<std::int64_t>(tree));
      out.length.push_back(length);
      out.leaves.push_back(below[s]);
    }
  }
  out.entry_offset.push_back(0);
  for (const std::int64_t id : leaf) {
    out.leaf_segment.push_back(ordinal[live(id).segment]);
    for (std::int64_t s = out.leaf_segment.back(); out.parent[s] != kNone; s = out.parent[s])
      out.entry_segment.push_back(s);
    std::reverse(out.entry_segment.begin() + out.entry_offset.back(), out.entry_segment.end());
    out.entry_offset.push_back(static_cast<std::int64_t>(out.entry_segment.size()));
  }
  for (const std::int64_t s : out.entry_segment) out.entry_length.push_back(out.length[s]);
  return out;
}

std::array<std::int64_t, kPruneReasons + 1> Forest::pruned(std::int64_t tree) const {
  return at_tree(tree).pruned;
}

std::array<std::int64_t, kPruneReasons + 1> Forest::pruned() const {
  std::array<std::int64_t, kPruneReasons + 1> total{};
  for (const Tree& tree : trees_)
    for (std::size_t reason = 0; reason < total.size(); ++reason)
      total[reason] += tree.pruned[reason];
  return total;
}

Stats Forest::stats() const {
  std::size_t bytes = pages_.bytes() + branches_.bytes() + segments_.bytes() + runs_.bytes() +
                      trees_.capacity() * sizeof(Tree);
  for (const Tree& tree : trees_) bytes += tree.prompt.capacity() * sizeof(std::int32_t);
  for (const Run& run : runs_.items)
    bytes +=
        run.pages.capacity() * sizeof(std::uint32_t) + run.steps.capacity() * sizeof(VersionStep);
  return {.tokens = tokens_,
          .tokens_live = tokens_live_,
          .segments = static_cast<std::int64_t>(segments_.live()),
          .pages = static_cast<std::int64_t>(pages_.in_use()),
          .bytes = static_cast<std::int64_t>(bytes)};
}

}  // namespace pyrl::tree
