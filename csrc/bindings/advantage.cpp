#include "tree/advantage.h"

#include "bindings/bind.h"

namespace pyrl::bindings {

using namespace tree;
namespace {

using Int = array<std::int64_t>;
using Float = array<double>;

template <typename Fill>
Float filled(const py::array& like, Fill fill) {
  Float result(like.size());
  const auto out = view_mutable(result);
  const py::gil_scoped_release release;
  fill(out);
  return result;
}

Float group_advantage_of(const Int& group_N, const Float& reward_N, const std::string& scale,
                         std::int64_t ddof, double eps, bool leave_one_out,
                         const std::string& single) {
  const BaselineOptions options{scale_named(scale), ddof, eps, leave_one_out, single_named(single)};
  return filled(group_N, [&, group = view(group_N), reward = view(reward_N)](auto out) {
    group_advantage(group, reward, options, out);
  });
}

Float group_mean_of(const Int& group_N, const Float& value_N) {
  return filled(group_N, [group = view(group_N), value = view(value_N)](auto out) {
    group_mean(group, value, out);
  });
}

Float whiten_of(const Float& value_T, double eps) {
  return filled(value_T, [value = view(value_T), eps](auto out) { whiten(value, eps, out); });
}

TreeArgs tree_of(const Int& parent_S, const Int& leaf_segment_N, const Int& group_N,
                 const Float& reward_N) {
  return {view(parent_S), view(leaf_segment_N), view(group_N), view(reward_N)};
}

Float ancestor_advantage_of(const Int& parent_S, const Int& leaf_segment_N, const Int& group_N,
                            const Float& reward_N, const std::string& ancestors,
                            const std::string& weight, const std::string& per, bool leave_one_out,
                            bool sqrt_leaves, std::int64_t ddof, double eps,
                            const std::string& single) {
  const AncestorOptions options{ancestor_set_named(ancestors),
                                ancestor_weight_named(weight),
                                per_named(per),
                                leave_one_out,
                                sqrt_leaves,
                                ddof,
                                eps,
                                single_named(single)};
  const TreeArgs tree = tree_of(parent_S, leaf_segment_N, group_N, reward_N);
  return filled(options.per == Per::kLeaf ? group_N : parent_S,
                [&](auto out) { ancestor_advantage(tree, options, out); });
}

Float treerl_released_advantage_of(const Int& parent_S, const Int& length_S,
                                   const Int& leaf_segment_N, const Int& group_N,
                                   const Float& reward_N, bool by_token) {
  const TreeArgs tree = tree_of(parent_S, leaf_segment_N, group_N, reward_N);
  return filled(parent_S, [&, length = view(length_S)](auto out) {
    treerl_released_advantage(tree, length, by_token, out);
  });
}

}  // namespace

void bind_advantage(py::module_& m) {
  m.def("group_advantage", &group_advantage_of, "group_N"_a, "reward_N"_a, py::kw_only(), "scale"_a,
        "ddof"_a, "eps"_a, "leave_one_out"_a, "single"_a);
  m.def("group_mean", &group_mean_of, "group_N"_a, "value_N"_a);
  m.def("whiten", &whiten_of, "value_T"_a, "eps"_a);
  m.def("ancestor_advantage", &ancestor_advantage_of, "parent_S"_a, "leaf_segment_N"_a, "group_N"_a,
        "reward_N"_a, py::kw_only(), "ancestors"_a, "weight"_a, "per"_a, "leave_one_out"_a,
        "sqrt_leaves"_a, "ddof"_a, "eps"_a, "single"_a);
  m.def("treerl_released_advantage", &treerl_released_advantage_of, "parent_S"_a, "length_S"_a,
        "leaf_segment_N"_a, "group_N"_a, "reward_N"_a, py::kw_only(), "by_token"_a);
}

}  // namespace pyrl::bindings
