#include "tree/without_replacement.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/check.h"
#include "base/random.h"

namespace pyrl::tree {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A sampler in float32 cannot draw a token so much less probable than another: the place is spent.
constexpr float kNothingLeft = -80;

// Streams of random numbers beside that of the draws, which has the number 0.
constexpr std::uint64_t kContinuation = 1, kRoot = 2;

double exponential(std::uint64_t seed, std::int64_t position, std::uint64_t stream) {
  const double u = uniform(seed, static_cast<std::uint64_t>(position), stream);
  return std::max(-std::log1p(-u), 0x1p-54);
}

double log_add_exp(double a, double b) {
  const double high = std::max(a, b);
  return high == -kInfinity ? high : high + std::log1p(std::exp(std::min(a, b) - high));
}

struct Kept {
  double gumbel;
  std::int64_t branch;  // kNone: a sibling that is still to be opened
  std::size_t sibling;
};

void check(const Forest& forest, std::int64_t votes, const Draws& draws) {
  PYRL_CHECK(votes >= 2, "votes: expected at least 2 without replacement, got ", votes);
  PYRL_CHECK(
      draws.logprob.size() == draws.branch.size() && draws.rest.size() == draws.branch.size(),
      "grow: expected ", draws.branch.size(), " log-probs, one per branch, got ",
      draws.logprob.size(), " and ", draws.rest.size());
  for (std::size_t b = 0; b < draws.branch.size(); ++b) {
    PYRL_CHECK(forest.length(draws.branch[b]) > 0, "grow: branch ", draws.branch[b],
               " has not drawn a token");
    // Rounding may take a log-prob a little beyond 0.
    PYRL_CHECK(std::isfinite(draws.logprob[b]) && draws.logprob[b] < 1e-3 && draws.rest[b] < 1e-3,
               "grow: expected log-probs <= 0, got ", draws.logprob[b], " of a token and ",
               draws.rest[b], " of the rest in branch ", draws.branch[b]);
    PYRL_CHECK(!std::isnan(forest.standing(draws.branch[b]).gumbel), "grow: branch ",
               draws.branch[b], " is not sampled without replacement");
  }
}

// The Gumbel number of the best continuation among the rest, given that of the whole node.
double next_gumbel(const Forest& forest, std::int64_t branch, const Standing& node, float rest) {
  const double e = exponential(forest.seed(branch), forest.length(branch) - 1, kContinuation);
  return -log_add_exp(-node.gumbel, std::log(e) - node.log_mass - rest);
}

// One step of one tree. Siblings are decided as if they were opened at once, in the order of rows.
class TreeStep {
 public:
  TreeStep(Forest& forest, std::int64_t tree, std::int64_t votes, Growth& growth)
      : forest_(forest), tree_(tree), votes_(static_cast<std::size_t>(votes)), growth_(growth) {
    forest.each_branch(tree, [this](std::int64_t branch, const Standing& node) {
      kept_.push_back({node.gumbel, branch, 0});
    });
  }

  void draw(std::int64_t branch, double logprob, float rest) {
    const Standing node = forest_.standing(branch);
    forest_.stand(branch, {node.log_mass + std::min(logprob, 0.0), node.gumbel});
    if (rest < kNothingLeft) return;
    const double gumbel = next_gumbel(forest_, branch, node, rest);
    if (gumbel <= forest_.refused(tree_)) return;
    if (kept_.size() == votes_) {
      const auto lowest = std::ranges::min_element(kept_, {}, &Kept::gumbel);
      if (gumbel <= lowest->gumbel) return forest_.refuse(tree_, gumbel);
      drop(*lowest);
      kept_.erase(lowest);
    }
    kept_.push_back({gumbel, kNone, siblings_.size()});
    siblings_.push_back({branch, node.log_mass, gumbel, true});
  }

  void finish() {
    for (const Sibling& sibling : siblings_) {
      if (!sibling.kept) continue;
      growth_.parent.push_back(sibling.parent);
      growth_.log_mass.push_back(sibling.log_mass);
      growth_.gumbel.push_back(sibling.gumbel);
    }
  }

 private:
  struct Sibling {
    std::int64_t parent;
    double log_mass, gumbel;
    bool kept;
  };

  void drop(const Kept& lowest) {
    forest_.refuse(tree_, lowest.gumbel);
    if (lowest.branch == kNone)
      siblings_[lowest.sibling].kept = false;
    else
      growth_.dropped.push_back(lowest.branch);
  }

  Forest& forest_;
  std::int64_t tree_;
  std::size_t votes_;
  Growth& growth_;
  std::vector<Kept> kept_;
  std::vector<Sibling> siblings_;
};

// The log of the probability that a node of this log-mass is kept.
double log_inclusion(double log_mass, double refused) {
  const double rate = std::exp(log_mass - refused);
  return rate < 1e-12 ? log_mass - refused : std::log(-std::expm1(-rate));
}

}  // namespace

void draw_roots(Forest& forest, std::span<const std::int64_t> trunk) {
  for (const std::int64_t branch : trunk)
    forest.stand(branch, {0, -std::log(exponential(forest.seed(branch), 0, kRoot))});
}

Growth grow(Forest& forest, std::int64_t votes, const Draws& draws) {
  check(forest, votes, draws);
  std::vector<std::size_t> row(draws.branch.size());
  std::iota(row.begin(), row.end(), 0);
  const auto tree_of = [&](std::size_t b) { return forest.tree_of(draws.branch[b]); };
  std::ranges::stable_sort(row, {}, tree_of);
  Growth growth;
  for (auto first = row.begin(); first != row.end();) {
    const std::int64_t tree = tree_of(*first);
    TreeStep step(forest, tree, votes, growth);
    for (; first != row.end() && tree_of(*first) == tree; ++first)
      step.draw(draws.branch[*first], draws.logprob[*first], draws.rest[*first]);
    step.finish();
  }
  return growth;
}

void weigh(Forest& forest) {
  for (std::int64_t tree = 0; tree < forest.trees(); ++tree) {
    const std::vector<std::int64_t> leaf = forest.leaves(tree);
    const double refused = forest.refused(tree);
    std::vector<double> weight;
    for (const std::int64_t branch : leaf) {
      const double log_mass = forest.standing(branch).log_mass;
      const bool closed = refused == kInfinity;
      weight.push_back(log_mass - (closed ? 0 : log_inclusion(log_mass, refused)));
    }
    if (leaf.empty()) continue;
    const double highest = std::ranges::max(weight);
    for (double& w : weight) w = std::exp(w - highest);
    const double sum = std::accumulate(weight.begin(), weight.end(), 0.0);
    for (std::size_t n = 0; n < leaf.size(); ++n) forest.set_weight(leaf[n], weight[n] / sum);
  }
}

}  // namespace pyrl::tree
