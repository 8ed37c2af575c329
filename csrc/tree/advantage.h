// Advantages of ragged groups and trees, in float64 and in a fixed order.
//
// A NaN reward is unknown: its leaf counts in no statistic, as if it were absent.
// A node stands for the set of known leaves below it; the segments of a chain without a fork share
// one set and so count as one ancestor. Tree statistics sum in leaf order, so that a tree without
// forks gives the bits of the flat group.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace pyrl::tree {

enum class Scale { kNone, kStd };
enum class Single { kZero, kReward };  // advantage of a leaf that is alone in its group
enum class AncestorSet { kRoot, kRootParent, kRootTrunk, kAll };
enum class AncestorWeight { kOne, kMean, kLeaves, kStd };
enum class Per { kLeaf, kSegment };

// The value of that name; std::invalid_argument for another one.
void read(std::string_view name, Scale& scale);            // none, std
void read(std::string_view name, Single& single);          // zero, reward
void read(std::string_view name, AncestorSet& ancestors);  // root, root+parent, root+trunk, all
void read(std::string_view name, AncestorWeight& weight);  // one, mean, leaves, std
void read(std::string_view name, Per& per);                // leaf, segment

struct BaselineOptions {
  Scale scale = Scale::kStd;
  std::int64_t ddof = 1;
  double eps = 1e-6;
  bool leave_one_out = false;
  Single single = Single::kZero;

  // Calls visit(name, pointer to member) for each field.
  template <typename Visit>
  static void each_field(Visit&& visit) {
    visit("scale", &BaselineOptions::scale);
    visit("ddof", &BaselineOptions::ddof);
    visit("eps", &BaselineOptions::eps);
    visit("leave_one_out", &BaselineOptions::leave_one_out);
    visit("single", &BaselineOptions::single);
  }
};

// (r - mean) [* G / (G - 1)] [/ (std + eps)] over runs of equal group ids; 0 where r is unknown.
void group_advantage(std::span<const std::int64_t> group_N, std::span<const double> reward_N,
                     const BaselineOptions& options, std::span<double> advantage_N);

// The mean of each run of equal group ids, at every member. Values must be finite.
void group_mean(std::span<const std::int64_t> group_N, std::span<const double> value_N,
                std::span<double> mean_N);

// (x - mean) / sqrt(var + eps), var with Bessel's correction; 0 where all values are equal.
void whiten(std::span<const double> value_T, double eps, std::span<double> whitened_T);

// Segments in an order that puts parents first; parent -1 is a root, one root for each group.
struct TreeArgs {
  std::span<const std::int64_t> parent_S;
  std::span<const std::int64_t> leaf_segment_N;
  std::span<const std::int64_t> group_N;
  std::span<const double> reward_N;
};

struct AncestorOptions {
  AncestorSet ancestors = AncestorSet::kRoot;
  AncestorWeight weight = AncestorWeight::kOne;
  Per per = Per::kLeaf;
  bool leave_one_out = false;
  bool sqrt_leaves = false;
  std::int64_t ddof = 1;
  double eps = 1e-6;
  Single single = Single::kZero;

  // Calls visit(name, pointer to member) for each field.
  template <typename Visit>
  static void each_field(Visit&& visit) {
    visit("ancestors", &AncestorOptions::ancestors);
    visit("weight", &AncestorOptions::weight);
    visit("per", &AncestorOptions::per);
    visit("leave_one_out", &AncestorOptions::leave_one_out);
    visit("sqrt_leaves", &AncestorOptions::sqrt_leaves);
    visit("ddof", &AncestorOptions::ddof);
    visit("eps", &AncestorOptions::eps);
    visit("single", &AncestorOptions::single);
  }
};

// scale(x) * sum over ancestors a of w_a (v(x) - V(a)) for each leaf [N] or each segment [S].
// Time O(S + sum of the leaves' depths). Roots, unknown leaves and segments above none but unknown
// leaves get 0.
void ancestor_advantage(const TreeArgs& tree, const AncestorOptions& options,
                        std::span<double> advantage);

// TreeRL in the order of its released code: V' = (V - mu) / sqrt(leaves), then V' + (V' -
// V'(parent)), where a difference of exactly 0 is replaced by the parent's. mu is the mean of V
// over the tokens of the leaves, or over their segments (by_token false).
void treerl_released_advantage(const TreeArgs& tree, std::span<const std::int64_t> length_S,
                               bool by_token, std::span<double> advantage_S);

}  // namespace pyrl::tree
