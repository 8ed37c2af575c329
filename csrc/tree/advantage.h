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

Scale scale_named(std::string_view name);                     // none, std
Single single_named(std::string_view name);                   // zero, reward
AncestorSet ancestor_set_named(std::string_view name);        // root, root+parent, root+trunk, all
AncestorWeight ancestor_weight_named(std::string_view name);  // one, mean, leaves, std
Per per_named(std::string_view name);                         // leaf, segment

struct BaselineOptions {
  Scale scale;
  std::int64_t ddof;
  double eps;
  bool leave_one_out;
  Single single;
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
  AncestorSet set;
  AncestorWeight weight;
  Per per;
  bool leave_one_out;
  bool sqrt_leaves;
  std::int64_t ddof;
  double eps;
  Single single;
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
