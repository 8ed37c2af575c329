#include "tree/forest.h"

#include <cmath>
#include <limits>
#include <utility>

#include "base/check.h"

namespace pyrl::tree {
namespace {

constexpr std::uint32_t kMaxLength = std::numeric_limits<std::int32_t>::max();

bool page_is_full(const TokenRecord* tail) {
  return reinterpret_cast<std::uintptr_t>(tail) % kPageBytes == 0;
}

void check_sizes(const Append& step) {
  const auto expect = [&](const char* name, std::size_t size) {
    PYRL_CHECK(size == step.branch.size(), "append: expected ", step.branch.size(), " elements in ",
               name, ", one per branch, got ", size);
  };
  expect("token", step.token.size());
  expect("logprob", step.logprob.size());
  expect("entropy", step.entropy.size());
  expect("confidence", step.confidence.size());
  if (!step.forced.empty()) expect("forced", step.forced.size());
}

}  // namespace

std::int32_t Forest::index_of(std::int64_t branch) const {
  const std::int64_t index = branch >> 32;
  if (index >= 0 && index < branches_.size()) [[likely]] {
    const Branch& found = branches_[static_cast<std::int32_t>(index)];
    if (found.generation == static_cast<std::uint32_t>(branch) && found.state != State::kFree)
        [[likely]]
      return static_cast<std::int32_t>(index);
  }
  throw StaleHandle(text("branch ", branch, ": expected a live branch of this forest, got a ",
                         "handle that was pruned or never given out"));
}

const Forest::Tree& Forest::at_tree(std::int64_t tree) const {
  PYRL_CHECK(tree >= 0 && tree < trees(), "tree: expected an index below ", trees(), ", got ",
             tree);
  return trees_[static_cast<std::size_t>(tree)];
}

std::int32_t Forest::add_tree(std::span<const std::int32_t> prompt) {
  PYRL_CHECK(!prompt.empty(), "add_tree: expected a prompt of at least one token, got none");
  for (std::size_t i = 0; i < prompt.size(); ++i)
    PYRL_CHECK(prompt[i] >= 0, "add_tree: expected token ids >= 0, got ", prompt[i], " at ", i);
  Tree& tree = trees_.emplace_back();
  tree.prompt.assign(prompt.begin(), prompt.end());
  tree.root = segments_.take();
  segments_[tree.root] = {};
  return static_cast<std::int32_t>(trees_.size() - 1);
}

std::int64_t Forest::add_trunk(std::int64_t tree, std::uint64_t seed) {
  const std::int32_t root = at_tree(tree).root;
  const std::int32_t trunk = trees_[static_cast<std::size_t>(tree)].trunks++;
  const std::int32_t index = add_branch(static_cast<std::int32_t>(tree), trunk, root, 0);
  branches_[index].seed = seed;
  return handle(index, branches_[index]);
}

std::int32_t Forest::add_branch(std::int32_t tree, std::int32_t trunk, std::int32_t parent,
                                std::uint32_t at) {
  const std::int32_t run = runs_.take();
  runs_[run].base = at;
  const std::int32_t index = branches_.take();
  Branch& branch = branches_[index];
  const std::uint32_t generation = branch.generation;
  branch = {};
  branch.generation = generation;
  branch.length = at;
  branch.segment = add_segment(parent, run, at, at);
  branch.tree = tree;
  branch.trunk = trunk;
  branch.state = State::kOpen;
  segments_[branch.segment].branch = index;
  push_back(branches_, &Branch::in_open, open_, index);
  push_back(branches_, &Branch::in_tree, trees_[static_cast<std::size_t>(tree)].branches, index);
  return index;
}

std::int32_t Forest::add_segment(std::int32_t parent, std::int32_t run, std::uint32_t begin,
                                 std::uint32_t end) {
  const std::int32_t index = segments_.take();
  Segment& segment = segments_[index];
  segment = {};
  segment.parent = parent;
  segment.run = run;
  segment.begin = begin;
  segment.end = end;
  push_back(segments_, &Segment::sibling, segments_[parent].children, index);
  ++runs_[run].segments;
  return index;
}

void Forest::append(const Append& step) {
  check_sizes(step);
  ++call_;
  for (std::size_t b = 0; b < step.branch.size(); ++b) {
    Branch& branch = branches_[index_of(step.branch[b])];
    __builtin_prefetch(branch.tail, 1);
    PYRL_CHECK(branch.state == State::kOpen, "append: expected open branches, got the finished ",
               step.branch[b]);
    PYRL_CHECK(branch.call != call_, "append: expected distinct branches, got ", step.branch[b],
               " twice");
    PYRL_CHECK(step.token[b] >= 0, "append: expected token ids >= 0, got ", step.token[b],
               " for branch ", step.branch[b]);
    PYRL_CHECK(branch.length < kMaxLength, "append: branch ", step.branch[b], " is full");
    branch.call = call_;
  }
  for (std::size_t b = 0; b < step.branch.size(); ++b) {
    Branch& branch = branches_[static_cast<std::int32_t>(step.branch[b] >> 32)];
    if (page_is_full(branch.tail)) open_page(branch);
    if (step.version != branch.version) begin_version(branch, step.version);
    const bool forced = !step.forced.empty() && step.forced[b];
    *branch.tail++ = {static_cast<std::uint32_t>(step.token[b]) | (forced ? kForcedBit : 0),
                      step.logprob[b], step.entropy[b], step.confidence[b]};
    ++branch.length;
  }
  tokens_ += static_cast<std::int64_t>(step.branch.size());
  tokens_live_ += static_cast<std::int64_t>(step.branch.size());
}

void Forest::open_page(Branch& branch) {
  Run& run = runs_[segments_[branch.segment].run];
  if (run.pages.empty()) run.steps.push_back({branch.length, branch.version});
  run.pages.push_back(pages_.take());
  branch.tail = pages_[run.pages.back()];
}

void Forest::begin_version(Branch& branch, std::int32_t version) {
  std::vector<VersionStep>& steps = runs_[segments_[branch.segment].run].steps;
  if (steps.back().position == branch.length) steps.pop_back();  // it holds no token yet
  steps.push_back({branch.length, version});
  branch.version = version;
}

std::vector<std::int64_t> Forest::fork(std::int64_t branch, std::int64_t at,
                                       std::span<const std::uint64_t> seed, bool share) {
  const std::int32_t source = index_of(branch);
  PYRL_CHECK(at >= 0 && at <= branches_[source].length,
             "fork: expected 0 <= at <= ", branches_[source].length, ", the length of branch ",
             branch, ", got ", at);
  PYRL_CHECK(!seed.empty(), "fork: expected at least one seed, one per new branch, got none");
  const auto [tree, trunk] = std::pair(branches_[source].tree, branches_[source].trunk);
  const auto position = static_cast<std::uint32_t>(at);
  const std::int32_t parent = fork_point(branches_[source].segment, position);
  const double weight = share ? share_weight(parent, seed.size()) : branches_[source].weight;
  std::vector<std::int64_t> forks;
  forks.reserve(seed.size());
  for (const std::uint64_t value : seed) {
    const std::int32_t index = add_branch(tree, trunk, parent, position);
    branches_[index].seed = value;
    branches_[index].weight = weight;
    forks.push_back(handle(index, branches_[index]));
  }
  return forks;
}

// Divides the weight below a place anew when `siblings` more branches open there; the weight of
// each.
double Forest::share_weight(std::int32_t place, std::size_t siblings) {
  double width = 0, sum = 0;
  for (std::int32_t s = segments_[place].children.first; s != kNone; s = segments_[s].sibling.next)
    ++width;
  const double wider = width + static_cast<double>(siblings);
  const std::int32_t end = next_preorder(place, true);
  for (std::int32_t s = next_preorder(place, false); s != end; s = next_preorder(s, false)) {
    if (segments_[s].branch == kNone) continue;
    double& weight = branches_[segments_[s].branch].weight;
    sum += weight;
    weight /= wider / width;
  }
  return sum / wider;
}

// The inner segment on the path that ends at `at`; made by a split if there is none.
std::int32_t Forest::fork_point(std::int32_t segment, std::uint32_t at) {
  while (segments_[segment].begin >= at && segments_[segments_[segment].parent].run != kNone)
    segment = segments_[segment].parent;
  const Segment& found = segments_[segment];
  return found.branch == kNone && found.end == at ? segment : split(segment, at);
}

std::int32_t Forest::split(std::int32_t segment, std::uint32_t at) {
  const std::int32_t upper = segments_.take();
  Segment& lower = segments_[segment];
  segments_[upper] = lower;
  segments_[upper].children = {};
  segments_[upper].branch = kNone;
  segments_[upper].end = at;
  replace(segments_, &Segment::sibling, segments_[lower.parent].children, segment, upper);
  lower.parent = upper;
  lower.begin = at;
  push_back(segments_, &Segment::sibling, segments_[upper].children, segment);
  ++runs_[lower.run].segments;
  return upper;
}

void Forest::set_weight(std::int64_t branch, double weight) {
  const std::int32_t index = index_of(branch);
  PYRL_CHECK(std::isfinite(weight) && weight >= 0, "set_weight: expected a number >= 0, got ",
             weight, " for branch ", branch);
  branches_[index].weight = weight;
}

void Forest::stand(std::int64_t branch, Standing standing) {
  const std::int32_t index = index_of(branch);
  PYRL_CHECK(standing.log_mass <= 0 && std::isfinite(standing.gumbel),
             "stand: expected a log-mass <= 0 and a finite Gumbel number, got ", standing.log_mass,
             " and ", standing.gumbel, " for branch ", branch);
  branches_[index].standing = standing;
}

void Forest::refuse(std::int64_t tree, double gumbel) {
  const double before = at_tree(tree).refused;
  PYRL_CHECK(!std::isnan(gumbel), "refuse: expected a Gumbel number, got NaN for tree ", tree);
  trees_[static_cast<std::size_t>(tree)].refused = std::max(before, gumbel);
}

void Forest::finish(std::span<const std::int64_t> branch, std::span<const std::uint8_t> reason) {
  PYRL_CHECK(reason.size() == branch.size(), "finish: expected ", branch.size(),
             " reasons, one per branch, got ", reason.size());
  ++call_;
  for (std::size_t b = 0; b < branch.size(); ++b) {
    Branch& found = branches_[index_of(branch[b])];
    PYRL_CHECK(found.state == State::kOpen, "finish: expected open branches, got the finished ",
               branch[b]);
    PYRL_CHECK(found.call != call_, "finish: expected distinct branches, got ", branch[b],
               " twice");
    PYRL_CHECK(reason[b] == 1 || reason[b] == 2,
               "finish: expected reason 1 (stopped) or 2 (truncated), got ", int{reason[b]},
               " for branch ", branch[b]);
    found.call = call_;
  }
  for (std::size_t b = 0; b < branch.size(); ++b) {
    const auto index = static_cast<std::int32_t>(branch[b] >> 32);
    branches_[index].state = State{reason[b]};
    unlink(branches_, &Branch::in_open, open_, index);
  }
}

void Forest::prune(std::int64_t branch, std::int64_t reason) {
  const std::int32_t index = index_of(branch);
  PYRL_CHECK(reason >= 1 && reason <= kPruneReasons, "prune: expected a reason from 1 to ",
             kPruneReasons, ", got ", reason);
  Branch& pruned = branches_[index];
  Tree& tree = trees_[static_cast<std::size_t>(pruned.tree)];
  ++tree.pruned[static_cast<std::size_t>(reason)];
  if (pruned.state == State::kOpen) unlink(branches_, &Branch::in_open, open_, index);
  unlink(branches_, &Branch::in_tree, tree.branches, index);
  std::int32_t segment = pruned.segment;
  do {
    free_segment(std::exchange(segment, segments_[segment].parent));
  } while (segments_[segment].run != kNone && segments_[segment].children.first == kNone);
  const std::uint32_t generation = pruned.generation + 1;
  pruned = {};
  pruned.generation = generation;
  branches_.give(index);
}

void Forest::free_segment(std::int32_t index) {
  const Segment& segment = segments_[index];
  cut(segment.run, segment.begin, end_of(segment));
  unlink(segments_, &Segment::sibling, segments_[segment.parent].children, index);
  segments_[index] = {};
  segments_.give(index);
}

// Drops the last range [begin, end) of a run, and with its last range the run.
void Forest::cut(std::int32_t index, std::uint32_t begin, std::uint32_t end) {
  Run& run = runs_[index];
  tokens_live_ -= end - begin;
  const std::size_t keep = (begin - run.base + kPageTokens - 1) / kPageTokens;
  for (; run.pages.size() > keep; run.pages.pop_back()) pages_.give(run.pages.back());
  while (!run.steps.empty() && run.steps.back().position >= begin) run.steps.pop_back();
  if (--run.segments > 0) return;
  run = {};
  runs_.give(index);
}

}  // namespace pyrl::tree
