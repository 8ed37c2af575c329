#include "tree/advantage.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"

namespace pyrl::tree {
namespace {

template <typename Enum, std::size_t n>
Enum named(std::string_view what, std::string_view name,
           const std::array<std::pair<std::string_view, Enum>, n>& table) {
  std::string names;
  for (const auto& [key, value] : table) {
    if (key == name) return value;
    names += (names.empty() ? "" : ", ") + std::string(key);
  }
  PYRL_CHECK(false, what, ": expected one of ", names, ", got ", name);
  return {};
}

struct Moments {
  std::int64_t count = 0;
  double mean = 0;     // the sum until close()
  double squares = 0;  // of the deviations from the mean
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  void add(double value) {
    ++count;
    mean += value;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  // Equal values have exactly that mean: rounding in sum / count must not make a difference.
  void close() {
    if (count > 0) mean = std::clamp(mean / static_cast<double>(count), low, high);
  }
  void add_deviation(double value) { squares += (value - mean) * (value - mean); }
  double variance(std::int64_t ddof) const {
    return count > ddof ? squares / static_cast<double>(count - ddof) : 0;
  }
  double std(std::int64_t ddof) const { return std::sqrt(variance(ddof)); }
  double leave_one_out() const {
    return count > 1 ? static_cast<double>(count) / static_cast<double>(count - 1) : 1;
  }
};

void check_size(std::string_view what, std::size_t got, std::string_view as, std::size_t expected) {
  PYRL_CHECK(got == expected, what, ": expected ", expected, " values as in ", as, ", got ", got);
}

void check_groups(std::span<const std::int64_t> group_N) {
  for (std::size_t n = 1; n < group_N.size(); ++n) {
    PYRL_CHECK(group_N[n - 1] <= group_N[n], "group_N: expected non-decreasing ids, got ",
               group_N[n - 1], " before ", group_N[n], " at ", n);
  }
}

void check_values(std::string_view what, std::span<const double> value_N, bool allow_nan) {
  for (std::size_t n = 0; n < value_N.size(); ++n) {
    PYRL_CHECK(std::isfinite(value_N[n]) || (allow_nan && std::isnan(value_N[n])), what,
               ": expected finite values", allow_nan ? " or NaN" : "", ", got ", value_N[n], " at ",
               n);
  }
}

void check_std(std::int64_t ddof, double eps) {
  PYRL_CHECK(ddof == 0 || ddof == 1, "ddof: expected 0 or 1, got ", ddof);
  PYRL_CHECK(eps > 0 && std::isfinite(eps), "eps: expected a positive number, got ", eps);
}

Moments moments(std::span<const double> value_N) {
  Moments result;
  for (double value : value_N)
    if (!std::isnan(value)) result.add(value);
  result.close();
  for (double value : value_N)
    if (!std::isnan(value)) result.add_deviation(value);
  return result;
}

// Calls visit(begin, end) for each run of equal ids.
template <typename Visit>
void for_each_group(std::span<const std::int64_t> group_N, Visit visit) {
  for (std::size_t begin = 0, end = 0; begin < group_N.size(); begin = end) {
    while (end < group_N.size() && group_N[end] == group_N[begin]) ++end;
    visit(begin, end);
  }
}

void baseline(std::span<const double> reward_N, const BaselineOptions& options,
              std::span<double> advantage_N) {
  const Moments group = moments(reward_N);
  const bool alone = group.count == 1;
  const double mean = alone && options.single == Single::kReward ? 0 : group.mean;
  const double factor = options.leave_one_out ? group.leave_one_out() : 1;
  const bool scaled = options.scale == Scale::kStd && !alone;
  const double unit = scaled ? group.std(options.ddof) + options.eps : 1;
  for (std::size_t n = 0; n < reward_N.size(); ++n)
    advantage_N[n] = std::isnan(reward_N[n]) ? 0 : (reward_N[n] - mean) * factor / unit;
}

// Statistics of the known leaves below each segment.
class Nodes {
 public:
  explicit Nodes(const TreeArgs& tree) : tree_(tree) {
    check_size("reward_N", tree.reward_N.size(), "group_N", tree.group_N.size());
    check_size("leaf_segment_N", tree.leaf_segment_N.size(), "group_N", tree.group_N.size());
    check_groups(tree.group_N);
    check_values("reward_N", tree.reward_N, true);
    index_segments();
    check_roots();
    for_each_node([](Moments& node, double reward) { node.add(reward); });
    for (Moments& node : node_S_) node.close();
  }

  void add_deviations() {
    for_each_node([](Moments& node, double reward) { node.add_deviation(reward); });
  }

  std::size_t size() const { return node_S_.size(); }
  const Moments& operator[](std::int64_t s) const { return node_S_[static_cast<std::size_t>(s)]; }
  std::int64_t parent(std::int64_t s) const { return tree_.parent_S[static_cast<std::size_t>(s)]; }
  std::int64_t root(std::int64_t s) const { return root_S_[static_cast<std::size_t>(s)]; }
  std::int64_t trunk(std::int64_t s) const { return trunk_S_[static_cast<std::size_t>(s)]; }

  // The nearest segment from s upwards with more than `count` leaves, or the root.
  std::int64_t wider(std::int64_t s, std::int64_t count) const {
    while (parent(s) >= 0 && (*this)[s].count <= count) s = parent(s);
    return s;
  }

 private:
  void index_segments() {
    const std::size_t size = tree_.parent_S.size();
    node_S_.resize(size);
    root_S_.resize(size);
    trunk_S_.resize(size);
    for (std::size_t i = 0; i < size; ++i) {
      const auto s = static_cast<std::int64_t>(i);
      PYRL_CHECK(-1 <= parent(s) && parent(s) < s, "parent_S: expected -1 or a segment before ", s,
                 ", got ", parent(s));
      root_S_[i] = parent(s) < 0 ? s : root(parent(s));
      trunk_S_[i] = parent(s) < 0 || parent(parent(s)) < 0 ? s : trunk(parent(s));
    }
  }

  void check_roots() const {
    constexpr std::int64_t kNone = -1;
    std::vector<std::int64_t> first_S(node_S_.size(), kNone);  // first leaf of the root's group
    for_each_group(tree_.group_N, [&](std::size_t begin, std::size_t end) {
      for (std::size_t n = begin; n < end; ++n) {
        const std::int64_t s = tree_.leaf_segment_N[n];
        PYRL_CHECK(0 <= s && s < static_cast<std::int64_t>(node_S_.size()),
                   "leaf_segment_N: expected an index below ", node_S_.size(), ", got ", s);
        PYRL_CHECK(root(s) == root(tree_.leaf_segment_N[begin]),
                   "group_N: expected one tree for each group, got two in group ",
                   tree_.group_N[n]);
      }
      const auto r = static_cast<std::size_t>(root(tree_.leaf_segment_N[begin]));
      PYRL_CHECK(first_S[r] == kNone, "group_N: expected one group for each tree, got groups ",
                 tree_.group_N[static_cast<std::size_t>(first_S[r])], " and ", tree_.group_N[begin],
                 " in one");
      first_S[r] = static_cast<std::int64_t>(begin);
    });
  }

  // Leaf order for every node: that is what makes a tree without forks equal the flat group.
  template <typename Visit>
  void for_each_node(Visit visit) {
    for (std::size_t n = 0; n < tree_.reward_N.size(); ++n) {
      if (std::isnan(tree_.reward_N[n])) continue;
      for (std::int64_t s = tree_.leaf_segment_N[n]; s >= 0; s = parent(s))
        visit(node_S_[static_cast<std::size_t>(s)], tree_.reward_N[n]);
    }
  }

  const TreeArgs& tree_;
  std::vector<Moments> node_S_;
  std::vector<std::int64_t> root_S_;
  std::vector<std::int64_t> trunk_S_;
};

class AncestorSum {
 public:
  AncestorSum(const Nodes& nodes, const AncestorOptions& options)
      : nodes_(nodes), options_(options) {}

  // For a set of `count` leaves of mean `value` that ends in segment s.
  double operator()(std::int64_t s, std::int64_t count, double value) {
    choose(s, count);
    double sum = 0;
    if (options_.weight == AncestorWeight::kLeaves) {
      double total = 0;
      for (std::int64_t a : chosen_) total += static_cast<double>(nodes_[a].count);
      for (std::int64_t a : chosen_)
        sum += static_cast<double>(nodes_[a].count) / total * difference(value, nodes_[a]);
    } else {
      for (std::int64_t a : chosen_) sum += difference(value, nodes_[a]);
    }
    if (options_.weight == AncestorWeight::kMean) sum /= static_cast<double>(chosen_.size());
    if (options_.leave_one_out) sum *= nodes_[nodes_.root(s)].leave_one_out();
    if (options_.sqrt_leaves) sum /= std::sqrt(static_cast<double>(count));
    return sum;
  }

 private:
  void choose(std::int64_t s, std::int64_t count) {
    const std::int64_t root = nodes_.root(s);
    chosen_.assign(1, root);
    if (options_.ancestors == AncestorSet::kRootParent) chosen_.push_back(nodes_.wider(s, count));
    if (options_.ancestors == AncestorSet::kRootTrunk) chosen_.push_back(nodes_.trunk(s));
    if (options_.ancestors != AncestorSet::kAll) return;
    for (s = nodes_.wider(s, count); nodes_[s].count < nodes_[root].count;
         s = nodes_.wider(s, nodes_[s].count))
      chosen_.push_back(s);
  }

  double difference(double value, const Moments& node) const {
    if (node.count == 1) return options_.single == Single::kReward ? value : 0;
    const double result = value - node.mean;
    if (options_.weight != AncestorWeight::kStd) return result;
    return result / (node.std(options_.ddof) + options_.eps);
  }

  const Nodes& nodes_;
  const AncestorOptions& options_;
  std::vector<std::int64_t> chosen_;
};

// The mean of the centred segment values over the tokens (or segments) of the leaves, per root.
std::vector<double> value_means(const Nodes& nodes, std::span<const std::int64_t> length_S,
                                std::span<const double> value_S, bool by_token) {
  std::vector<double> sum_S(nodes.size(), 0), weight_S(nodes.size(), 0);
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const auto s = static_cast<std::int64_t>(i);
    if (nodes.parent(s) < 0) continue;  // the prompt is no part of an answer
    const std::int64_t units = by_token ? length_S[i] : std::min<std::int64_t>(length_S[i], 1);
    const auto weight = static_cast<double>(units * nodes[s].count);
    const auto root = static_cast<std::size_t>(nodes.root(s));
    sum_S[root] += weight * value_S[i];
    weight_S[root] += weight;
  }
  for (std::size_t i = 0; i < nodes.size(); ++i)
    if (weight_S[i] > 0) sum_S[i] /= weight_S[i];
  return sum_S;
}

}  // namespace

void read(std::string_view name, Scale& scale) {
  using enum Scale;
  scale = named<Scale, 2>("scale", name, {{{"none", kNone}, {"std", kStd}}});
}

void read(std::string_view name, Single& single) {
  using enum Single;
  single = named<Single, 2>("single", name, {{{"zero", kZero}, {"reward", kReward}}});
}

void read(std::string_view name, AncestorSet& ancestors) {
  using enum AncestorSet;
  ancestors = named<AncestorSet, 4>(
      "ancestors", name,
      {{{"root", kRoot}, {"root+parent", kRootParent}, {"root+trunk", kRootTrunk}, {"all", kAll}}});
}

void read(std::string_view name, AncestorWeight& weight) {
  using enum AncestorWeight;
  weight = named<AncestorWeight, 4>(
      "weight", name, {{{"one", kOne}, {"mean", kMean}, {"leaves", kLeaves}, {"std", kStd}}});
}

void read(std::string_view name, Per& per) {
  using enum Per;
  per = named<Per, 2>("per", name, {{{"leaf", kLeaf}, {"segment", kSegment}}});
}

void group_advantage(std::span<const std::int64_t> group_N, std::span<const double> reward_N,
                     const BaselineOptions& options, std::span<double> advantage_N) {
  check_size("reward_N", reward_N.size(), "group_N", group_N.size());
  check_groups(group_N);
  check_values("reward_N", reward_N, true);
  check_std(options.ddof, options.eps);
  for_each_group(group_N, [&](std::size_t begin, std::size_t end) {
    const std::size_t size = end - begin;
    baseline(reward_N.subspan(begin, size), options, advantage_N.subspan(begin, size));
  });
}

void group_mean(std::span<const std::int64_t> group_N, std::span<const double> value_N,
                std::span<double> mean_N) {
  check_size("value_N", value_N.size(), "group_N", group_N.size());
  check_groups(group_N);
  check_values("value_N", value_N, false);
  for_each_group(group_N, [&](std::size_t begin, std::size_t end) {
    const double mean = moments(value_N.subspan(begin, end - begin)).mean;
    std::fill(mean_N.begin() + begin, mean_N.begin() + end, mean);
  });
}

void whiten(std::span<const double> value_T, double eps, std::span<double> whitened_T) {
  check_values("value_T", value_T, false);
  check_std(1, eps);
  const Moments batch = moments(value_T);
  const double inverse = 1 / std::sqrt(batch.variance(1) + eps);
  for (std::size_t t = 0; t < value_T.size(); ++t)
    whitened_T[t] = (value_T[t] - batch.mean) * inverse;
}

void ancestor_advantage(const TreeArgs& tree, const AncestorOptions& options,
                        std::span<double> advantage) {
  check_std(options.ddof, options.eps);
  Nodes nodes(tree);
  if (options.weight == AncestorWeight::kStd) nodes.add_deviations();
  AncestorSum sum(nodes, options);
  std::fill(advantage.begin(), advantage.end(), 0.0);
  for (std::size_t i = 0; i < advantage.size(); ++i) {
    if (options.per == Per::kLeaf) {
      if (!std::isnan(tree.reward_N[i]))
        advantage[i] = sum(tree.leaf_segment_N[i], 1, tree.reward_N[i]);
    } else {
      const auto s = static_cast<std::int64_t>(i);
      if (nodes.parent(s) >= 0 && nodes[s].count > 0)
        advantage[i] = sum(s, nodes[s].count, nodes[s].mean);
    }
  }
}

void treerl_released_advantage(const TreeArgs& tree, std::span<const std::int64_t> length_S,
                               bool by_token, std::span<double> advantage_S) {
  check_size("length_S", length_S.size(), "parent_S", tree.parent_S.size());
  const Nodes nodes(tree);
  std::vector<double> value_S(nodes.size(), 0), local_S(nodes.size(), 0);
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const auto s = static_cast<std::int64_t>(i);
    const Moments& root = nodes[nodes.root(s)];
    if (nodes[s].count > 0) value_S[i] = root.leave_one_out() * (nodes[s].mean - root.mean);
  }
  const std::vector<double> mean_S = value_means(nodes, length_S, value_S, by_token);
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const auto s = static_cast<std::int64_t>(i);
    advantage_S[i] = 0;
    if (nodes[s].count == 0) continue;
    const double centred = value_S[i] - mean_S[static_cast<std::size_t>(nodes.root(s))];
    value_S[i] = centred / std::sqrt(static_cast<double>(nodes[s].count));
    if (nodes.parent(s) < 0) continue;
    const auto parent = static_cast<std::size_t>(nodes.parent(s));
    local_S[i] = value_S[i] - value_S[parent];
    if (local_S[i] == 0) local_S[i] = local_S[parent];
    advantage_S[i] = value_S[i] + local_S[i];
  }
}

}  // namespace pyrl::tree
