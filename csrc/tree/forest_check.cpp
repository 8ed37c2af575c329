// The invariants of a forest, for loading and for tests; each index is checked before its use.
#include <algorithm>

#include "base/check.h"
#include "tree/forest.h"

namespace pyrl::tree {
namespace {

template <typename Item>
void check_index(const Slots<Item>& slots, std::int32_t index, const char* what) {
  PYRL_CHECK(index >= 0 && index < slots.size(), "forest: ", what, " ", index, " of ",
             slots.size());
}

// Walks a list and calls visit(index); a broken link or a cycle is an error.
template <typename Item, typename Visit>
void walk(const Slots<Item>& slots, Link Item::* link, const List& list, const char* what,
          Visit&& visit) {
  std::int32_t prev = kNone, left = slots.size();
  for (std::int32_t i = list.first; i != kNone; i = (slots[i].*link).next) {
    check_index(slots, i, what);
    PYRL_CHECK((slots[i].*link).prev == prev && left-- > 0, "forest: broken list of ", what, "s");
    visit(i);
    prev = i;
  }
  PYRL_CHECK(list.last == prev, "forest: the list of ", what, "s ends elsewhere");
}

template <typename Item>
void check_free(const Slots<Item>& slots, std::vector<std::uint8_t>& used, const char* what) {
  for (const std::int32_t index : slots.free) {
    check_index(slots, index, what);
    PYRL_CHECK(!used[index], "forest: ", what, " ", index, " is both free and in use");
    used[index] = 1;
  }
  PYRL_CHECK(std::all_of(used.begin(), used.end(), [](std::uint8_t u) { return u; }), "forest: a ",
             what, " is neither free nor in use");
}

}  // namespace

void Forest::check() const {
  std::vector<std::uint8_t> seen(segments_.items.size());
  std::int64_t tokens = 0;
  for (std::int32_t tree = 0; tree < trees(); ++tree) check_tree(tree, seen);
  check_free(segments_, seen, "segment");
  for (const std::int32_t index : segments_.free)
    PYRL_CHECK(segments_[index].run == kNone, "forest: free segment ", index, " has a run");
  for (const Segment& segment : segments_.items) tokens += end_of(segment) - segment.begin;
  PYRL_CHECK(tokens == tokens_live_ && tokens <= tokens_, "forest: ", tokens, " tokens, ",
             tokens_live_, " counted, ", tokens_, " ever");
  check_branches();
  check_runs();
}

void Forest::check_tree(std::int32_t tree, std::vector<std::uint8_t>& seen) const {
  std::vector<std::int32_t> pending{trees_[tree].root};
  check_index(segments_, trees_[tree].root, "segment");
  const Segment& root = segments_[trees_[tree].root];
  PYRL_CHECK(root.run == kNone && root.parent == kNone && root.sibling.prev == kNone &&
                 root.sibling.next == kNone,
             "forest: the root of tree ", tree, " is no root");
  while (!pending.empty()) {
    const std::int32_t index = pending.back();
    pending.pop_back();
    PYRL_CHECK(!seen[index], "forest: segment ", index, " is reached twice");
    seen[index] = 1;
    walk(segments_, &Segment::sibling, segments_[index].children, "segment", [&](std::int32_t i) {
      PYRL_CHECK(segments_[i].parent == index, "forest: segment ", i, " has another parent");
      check_segment(i, tree);
      pending.push_back(i);
    });
  }
}

void Forest::check_segment(std::int32_t index, std::int32_t tree) const {
  const Segment& segment = segments_[index];
  const bool leaf = segment.children.first == kNone;
  check_index(runs_, segment.run, "run");
  PYRL_CHECK(leaf == (segment.branch != kNone), "forest: segment ", index,
             " is neither an inner one nor a branch's");
  if (leaf) {
    check_index(branches_, segment.branch, "branch");
    const Branch& branch = branches_[segment.branch];
    PYRL_CHECK(branch.segment == index && branch.tree == tree && branch.state != State::kFree,
               "forest: branch ", segment.branch, " and segment ", index, " disagree");
  }
  const Segment& parent = segments_[segment.parent];
  PYRL_CHECK(
      segment.begin == (parent.run == kNone ? 0 : parent.end) && segment.begin <= end_of(segment),
      "forest: segment ", index, " is [", segment.begin, ", ", end_of(segment),
      ") below a parent that ends at ", parent.end);
  PYRL_CHECK(segment.begin == runs_[segment.run].base || parent.run == segment.run,
             "forest: segment ", index, " begins in the middle of its run");
}

void Forest::check_runs() const {
  const std::vector<std::uint32_t> lengths = run_lengths();
  std::vector<std::uint32_t> segments(lengths.size());
  for (const Segment& segment : segments_.items)
    if (segment.run != kNone) ++segments[segment.run];
  std::vector<std::uint8_t> used(lengths.size()), page_used(pages_.made());
  std::size_t pages = 0;
  for (std::int32_t index = 0; index < runs_.size(); ++index) {
    const Run& run = runs_[index];
    used[index] = run.segments > 0;
    PYRL_CHECK(run.segments == segments[index], "forest: run ", index, " counts ", run.segments,
               " segments of ", segments[index]);
    PYRL_CHECK(run.pages.size() == (lengths[index] + kPageTokens - 1) / kPageTokens, "forest: run ",
               index, " has ", run.pages.size(), " pages for ", lengths[index], " tokens");
    PYRL_CHECK(run.steps.empty() == (lengths[index] == 0) &&
                   (run.steps.empty() || run.steps.front().position == run.base),
               "forest: run ", index, " has a token without a weight version");
    for (std::size_t i = 1; i <= run.steps.size(); ++i)
      PYRL_CHECK(run.steps[i - 1].position <
                     (i < run.steps.size() ? run.steps[i].position : run.base + lengths[index]),
                 "forest: run ", index, " has weight versions out of order");
    for (const std::uint32_t page : run.pages) {
      PYRL_CHECK(page < page_used.size() && !page_used[page], "forest: page ", page,
                 " is used twice");
      page_used[page] = 1;
    }
    pages += run.pages.size();
  }
  PYRL_CHECK(pages == pages_.in_use(), "forest: ", pages, " pages are used, ", pages_.in_use(),
             " are taken");
  check_free(runs_, used, "run");
}

void Forest::check_branches() const {
  std::vector<std::uint8_t> used(branches_.items.size()), open(used.size());
  walk(branches_, &Branch::in_open, open_, "branch", [&](std::int32_t i) { open[i] = 1; });
  for (std::int32_t tree = 0; tree < trees(); ++tree)
    walk(branches_, &Branch::in_tree, trees_[tree].branches, "branch", [&](std::int32_t i) {
      const Branch& branch = branches_[i];
      PYRL_CHECK(branch.tree == tree && branch.trunk >= 0 && branch.trunk < trees_[tree].trunks,
                 "forest: branch ", i, " is in tree ", branch.tree, ", trunk ", branch.trunk);
      used[i] = 1;
    });
  for (std::int32_t i = 0; i < branches_.size(); ++i) {
    const Branch& branch = branches_[i];
    PYRL_CHECK(open[i] == (branch.state == State::kOpen) &&
                   used[i] == (branch.state != State::kFree) && branch.state <= State::kFree,
               "forest: branch ", i, " is in the wrong list for its state");
    if (!used[i]) continue;
    check_index(segments_, branch.segment, "segment");
    PYRL_CHECK(segments_[branch.segment].branch == i, "forest: branch ", i, " has no segment");
    const Run& run = runs_[segments_[branch.segment].run];
    const std::uint32_t slot = (branch.length - run.base) % kPageTokens;
    PYRL_CHECK(slot == 0 || branch.tail == pages_[run.pages.back()] + slot, "forest: branch ", i,
               " writes at the wrong place");
  }
  check_free(branches_, used, "branch");
}

}  // namespace pyrl::tree
