// The rollout forest: a tree per prompt, a branch per response, every shared token stored once.
//
// A *run* is what one branch appended, a list of token pages. A *segment* is a range of one run
// without a fork inside; segments form the tree. A fork inside a segment splits it in place: a new
// upper segment takes the head of the range, the old one keeps the tail, its branch and its
// children, so no token moves and handles stay valid. Pruning cuts only the end of a run.
//
// Every order (handles, children, exports) is that of creation. One thread at a time may write,
// and none may read meanwhile.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tree/pages.h"
#include "tree/slots.h"

namespace pyrl::tree {

enum class State : std::uint8_t { kOpen = 0, kStopped = 1, kTruncated = 2, kFree = 3 };

constexpr int kPruneReasons = 6;

// Where a branch stands in a tree without replacement (without_replacement.h); NaN in others.
struct Standing {
  double log_mass = std::numeric_limits<double>::quiet_NaN();
  double gumbel = std::numeric_limits<double>::quiet_NaN();
};

// One token for each of B distinct open branches.
struct Append {
  std::span<const std::int64_t> branch;
  std::span<const std::int32_t> token;
  std::span<const float> logprob, entropy, confidence;
  std::span<const bool> forced;  // [B], or empty: none
  std::int32_t version = 0;      // of the weights that sampled these tokens
};

// The response tokens of one branch, [T] each.
struct Path {
  std::vector<std::int32_t> tokens;
  std::vector<float> logprob, entropy, confidence;
  std::vector<std::uint8_t> forced;
  std::vector<std::int32_t> version;
};

// [N] each.
struct LeafTable {
  std::vector<std::int64_t> tree, trunk, length, depth;
  std::vector<std::uint8_t> finish;
  std::vector<double> weight, log_mass, mean_entropy;
};

// A forest restricted to N leaves: S segments, depth first, parents before children.
struct Segments {
  std::vector<std::int64_t> parent, tree, length, leaves;               // [S]
  std::vector<std::int64_t> leaf_segment;                               // [N]
  std::vector<std::int64_t> entry_offset, entry_segment, entry_length;  // CSR: [N + 1], [E], [E]
};

struct Stats {
  std::int64_t tokens;       // appended since the start, pruned ones included
  std::int64_t tokens_live;  // held now
  std::int64_t segments, pages, bytes;
};

class Forest {
 public:
  Forest() = default;
  Forest(Forest&&) = default;
  Forest& operator=(Forest&&) = default;

  std::int32_t add_tree(std::span<const std::int32_t> prompt);
  std::int64_t add_trunk(std::int64_t tree, std::uint64_t seed);
  void append(const Append& step);
  // New open branches, one per seed, that share the first `at` response tokens of `branch`.
  // `share`: a branch's weight has a factor of 1 / width for each place on its path that is forked,
  // whatever was forked first; else the new ones have the branch's.
  std::vector<std::int64_t> fork(std::int64_t branch, std::int64_t at,
                                 std::span<const std::uint64_t> seed, bool share);
  void finish(std::span<const std::int64_t> branch, std::span<const std::uint8_t> reason);
  void prune(std::int64_t branch, std::int64_t reason);

  std::int64_t length(std::int64_t branch) const { return live(branch).length; }
  std::uint64_t seed(std::int64_t branch) const { return live(branch).seed; }
  std::int64_t tree_of(std::int64_t branch) const { return live(branch).tree; }
  std::int64_t trunk_of(std::int64_t branch) const { return live(branch).trunk; }
  double weight(std::int64_t branch) const { return live(branch).weight; }
  void set_weight(std::int64_t branch, double weight);
  Standing standing(std::int64_t branch) const { return live(branch).standing; }
  void stand(std::int64_t branch, Standing standing);
  // The largest Gumbel number that the tree has refused or dropped: -inf at first, +inf once it is
  // closed to siblings. `refuse` raises it.
  double refused(std::int64_t tree) const { return at_tree(tree).refused; }
  void refuse(std::int64_t tree, double gumbel);
  std::span<const std::int32_t> prompt(std::int64_t tree) const { return at_tree(tree).prompt; }
  std::int64_t trees() const { return static_cast<std::int64_t>(trees_.size()); }

  Path path(std::int64_t branch) const;
  std::vector<std::int64_t> leaves() const;
  std::vector<std::int64_t> leaves(std::int64_t tree) const;
  std::vector<std::int64_t> open() const;
  LeafTable leaf_table(std::span<const std::int64_t> leaf) const;
  // Mean over the last `window` response tokens, or all if fewer; NaN without any.
  std::vector<double> tail_confidence(std::span<const std::int64_t> leaf,
                                      std::int64_t window) const;
  Segments segments(std::span<const std::int64_t> leaf) const;
  // Ascending positions in [begin, end) of the largest entropies, ties to the lowest position,
  // pairwise at least `min_gap` apart (greedy by entropy).
  std::vector<std::int64_t> top_entropy(std::int64_t branch, std::int64_t n, std::int64_t begin,
                                        std::int64_t end, std::int64_t min_gap) const;
  // Indexed by reason, 0 unused.
  std::array<std::int64_t, kPruneReasons + 1> pruned() const;
  std::array<std::int64_t, kPruneReasons + 1> pruned(std::int64_t tree) const;
  Stats stats() const;

  std::string save() const;
  static Forest load(std::string_view bytes);
  // Same contents, same handles, and the same handles for whatever comes next.
  bool operator==(const Forest& other) const { return save() == other.save(); }

  // Throws std::invalid_argument that names the first broken invariant.
  void check() const;

  // Calls visit(branch, standing) for the live branches of a tree, in creation order.
  template <typename Visit>
  void each_branch(std::int64_t tree, Visit&& visit) const {
    for (std::int32_t i = at_tree(tree).branches.first; i != kNone; i = branches_[i].in_tree.next)
      visit(handle(i, branches_[i]), branches_[i].standing);
  }

  // Calls read(position, records) for the response tokens [begin, end), in order, page by page.
  template <typename Read>
  void read(std::int64_t branch, std::uint32_t begin, std::uint32_t end, Read&& read) const {
    for (const Piece& piece : pieces(branch, begin, end)) read_piece(piece, read);
  }

 private:
  struct Branch {
    TokenRecord* tail = nullptr;  // next write; kPageBytes-aligned means that a page must be taken
    std::uint32_t generation = 1;
    std::uint32_t length = 0;
    std::uint32_t call = 0;  // the last batched call that named this branch: finds duplicates
    std::int32_t version = 0;
    std::int32_t segment = kNone, tree = kNone, trunk = kNone;
    State state = State::kFree;
    double weight = 1;
    Standing standing;
    std::uint64_t seed = 0;
    Link in_open, in_tree;
  };
  struct Segment {
    std::int32_t parent = kNone;
    List children;
    Link sibling;
    std::int32_t run = kNone;          // kNone: a root
    std::int32_t branch = kNone;       // kNone: an inner segment
    std::uint32_t begin = 0, end = 0;  // response positions; a branch's length is its segment's end
  };
  struct VersionStep {
    std::uint32_t position;
    std::int32_t version;
  };
  struct Run {
    std::vector<std::uint32_t> pages;
    std::vector<VersionStep> steps;
    std::uint32_t base = 0;      // response position of its first token
    std::uint32_t segments = 0;  // ranges still in use
  };
  struct Tree {
    std::vector<std::int32_t> prompt;
    std::int32_t root = kNone;
    std::int32_t trunks = 0;  // made so far, pruned ones included
    List branches;
    std::array<std::int64_t, kPruneReasons + 1> pruned{};
    double refused = -std::numeric_limits<double>::infinity();
  };
  struct Piece {
    std::int32_t run;
    std::uint32_t begin, end;
  };
  static std::int64_t handle(std::int32_t index, const Branch& branch) {
    return std::int64_t{index} << 32 | branch.generation;
  }
  std::int32_t index_of(std::int64_t branch) const;
  const Branch& live(std::int64_t branch) const { return branches_[index_of(branch)]; }
  const Tree& at_tree(std::int64_t tree) const;
  std::uint32_t end_of(const Segment& segment) const {
    return segment.branch == kNone ? segment.end : branches_[segment.branch].length;
  }

  std::int32_t add_branch(std::int32_t tree, std::int32_t trunk, std::int32_t parent,
                          std::uint32_t at);
  std::int32_t add_segment(std::int32_t parent, std::int32_t run, std::uint32_t begin,
                           std::uint32_t end);
  double share_weight(std::int32_t place, std::size_t siblings);
  std::int32_t fork_point(std::int32_t segment, std::uint32_t at);
  std::int32_t split(std::int32_t segment, std::uint32_t at);
  void open_page(Branch& branch);
  void begin_version(Branch& branch, std::int32_t version);
  void cut(std::int32_t run, std::uint32_t begin, std::uint32_t end);
  void free_segment(std::int32_t segment);

  std::vector<Piece> pieces(std::int64_t branch, std::uint32_t begin, std::uint32_t end) const;
  void copy_versions(const Piece& piece, std::int32_t* out) const;
  double mean(std::int64_t branch, std::uint32_t begin, float TokenRecord::* field) const;
  void append_leaves(const Tree& tree, std::vector<std::int64_t>& out) const;
  std::vector<std::int64_t> count_below(std::span<const std::int64_t> leaf) const;
  std::int32_t next_preorder(std::int32_t segment, bool skip_children) const;

  template <typename Read>
  void read_piece(const Piece& piece, Read& read) const {
    const Run& run = runs_[piece.run];
    for (std::uint32_t position = piece.begin; position < piece.end;) {
      const std::uint32_t offset = position - run.base, slot = offset % kPageTokens;
      const std::uint32_t count = std::min(kPageTokens - slot, piece.end - position);
      read(position,
           std::span<const TokenRecord>(pages_[run.pages[offset / kPageTokens]] + slot, count));
      position += count;
    }
  }

  template <typename Self, typename Stream>
  static void transfer(Self& self, Stream& stream);
  std::vector<std::uint32_t> run_lengths() const;
  void find_tails();
  void check_tree(std::int32_t tree, std::vector<std::uint8_t>& seen) const;
  void check_segment(std::int32_t segment, std::int32_t tree) const;
  void check_runs() const;
  void check_branches() const;

  TokenPages pages_;
  Slots<Branch> branches_;
  Slots<Segment> segments_;
  Slots<Run> runs_;
  std::vector<Tree> trees_;
  List open_;
  std::int64_t tokens_ = 0, tokens_live_ = 0;
  std::uint32_t call_ = 0;
};

}  // namespace pyrl::tree
