// Trees: forest, signals, rows and advantages.
#include <optional>
#include <variant>

#include "bindings/bind.h"
#include "bindings/column.h"
#include "tree/advantage.h"
#include "tree/forest.h"
#include "tree/pack.h"
#include "tree/pack_tree.h"
#include "tree/signals.h"
#include "tree/without_replacement.h"

namespace pyrl::bindings {

using namespace tree;

namespace {

using Handles = array<std::int64_t>;

void append(Forest& forest, const Handles& branch, const array<std::int32_t>& token,
            const array<float>& logprob, const array<float>& entropy,
            const array<float>& confidence, std::int32_t version,
            const std::variant<bool, array<bool>>& forced) {
  Append step{view(branch),     view(token), view(logprob), view(entropy),
              view(confidence), {},          version};
  if (const auto* each = std::get_if<array<bool>>(&forced)) {
    PYRL_CHECK(each->size() == branch.size(), "append: expected ", branch.size(),
               " elements in forced, one per branch, got ", each->size());
    step.forced = view(*each);
    return forest.append(step);
  }
  const auto all = std::make_unique<bool[]>(std::get<bool>(forced) ? step.branch.size() : 0);
  if (std::get<bool>(forced)) {
    std::fill_n(all.get(), step.branch.size(), true);
    step.forced = {all.get(), step.branch.size()};
  }
  forest.append(step);
}

py::dict stats(const Forest& forest) {
  const Stats stats = forest.stats();
  return py::dict("tokens"_a = stats.tokens, "tokens_live"_a = stats.tokens_live,
                  "segments"_a = stats.segments, "pages"_a = stats.pages, "bytes"_a = stats.bytes);
}

py::array_t<std::int64_t> pruned(const Forest& forest, std::optional<std::int64_t> tree) {
  const auto count = tree ? forest.pruned(*tree) : forest.pruned();
  return own(std::vector<std::int64_t>(count.begin(), count.end()));
}

void bind_records(py::module_& m) {
  py::class_<Path>(m, "Path")
      .def_property_readonly("tokens", column(&Path::tokens))
      .def_property_readonly("logprob", column(&Path::logprob))
      .def_property_readonly("entropy", column(&Path::entropy))
      .def_property_readonly("confidence", column(&Path::confidence))
      .def_property_readonly("forced", flag_column(&Path::forced))
      .def_property_readonly("version", column(&Path::version));
  py::class_<LeafTable>(m, "LeafTable")
      .def_property_readonly("tree_N", column(&LeafTable::tree))
      .def_property_readonly("trunk_N", column(&LeafTable::trunk))
      .def_property_readonly("length_N", column(&LeafTable::length))
      .def_property_readonly("depth_N", column(&LeafTable::depth))
      .def_property_readonly("finish_N", column(&LeafTable::finish))
      .def_property_readonly("weight_N", column(&LeafTable::weight))
      .def_property_readonly("log_mass_N", column(&LeafTable::log_mass))
      .def_property_readonly("mean_entropy_N", column(&LeafTable::mean_entropy));
  py::class_<Segments>(m, "Segments")
      .def_property_readonly("parent_S", column(&Segments::parent))
      .def_property_readonly("tree_S", column(&Segments::tree))
      .def_property_readonly("length_S", column(&Segments::length))
      .def_property_readonly("leaves_S", column(&Segments::leaves))
      .def_property_readonly("leaf_segment_N", column(&Segments::leaf_segment))
      .def_property_readonly("entry_offset_N1", column(&Segments::entry_offset))
      .def_property_readonly("entry_segment_E", column(&Segments::entry_segment))
      .def_property_readonly("entry_length_E", column(&Segments::entry_length));
}

void bind_growth(py::class_<Forest>& forest) {
  forest.def(py::init<>())
      .def(
          "add_tree", [](Forest& f, const array<std::int32_t>& p) { return f.add_tree(view(p)); },
          "prompt"_a)
      .def("add_trunk", &Forest::add_trunk, "tree"_a, "seed"_a)
      .def("append", &append, "branch_B"_a, "token_B"_a, "logprob_B"_a, "entropy_B"_a,
           "confidence_B"_a, "version"_a = 0, "forced"_a = false)
      .def(
          "fork",
          [](Forest& f, std::int64_t branch, std::int64_t at, const array<std::uint64_t>& seed,
             bool share) { return own(f.fork(branch, at, view(seed), share)); },
          "branch"_a, "at"_a, "seed_B"_a, "share"_a = true)
      .def(
          "finish",
          [](Forest& f, const Handles& branch, const array<std::uint8_t>& reason) {
            f.finish(view(branch), view(reason));
          },
          "branch_B"_a, "reason_B"_a)
      .def("prune", &Forest::prune, "branch"_a, "reason"_a);
}

void bind_branches(py::class_<Forest>& forest) {
  forest.def("length", &Forest::length, "branch"_a)
      .def("seed", &Forest::seed, "branch"_a)
      .def("tree_of", &Forest::tree_of, "branch"_a)
      .def("trunk_of", &Forest::trunk_of, "branch"_a)
      .def("weight", &Forest::weight, "branch"_a)
      .def("set_weight", &Forest::set_weight, "branch"_a, "weight"_a)
      .def(
          "stand",
          [](Forest& f, std::int64_t branch, double log_mass, double gumbel) {
            f.stand(branch, {log_mass, gumbel});
          },
          "branch"_a, "log_mass"_a, "gumbel"_a)
      .def(
          "log_mass",
          [](const Forest& f, std::int64_t branch) { return f.standing(branch).log_mass; },
          "branch"_a)
      .def(
          "gumbel", [](const Forest& f, std::int64_t branch) { return f.standing(branch).gumbel; },
          "branch"_a)
      .def("refused", &Forest::refused, "tree"_a)
      .def("refuse", &Forest::refuse, "tree"_a, "gumbel"_a)
      .def(
          "prompt",
          [](const Forest& f, std::int64_t tree) {
            const auto prompt = f.prompt(tree);
            return own(std::vector<std::int32_t>(prompt.begin(), prompt.end()));
          },
          "tree"_a)
      .def_property_readonly("trees", &Forest::trees)
      .def("path", &Forest::path, "branch"_a)
      .def(
          "leaves",
          [](const Forest& f, std::optional<std::int64_t> tree) {
            return own(tree ? f.leaves(*tree) : f.leaves());
          },
          "tree"_a = py::none())
      .def("open", [](const Forest& f) { return own(f.open()); });
}

void bind_leaves(py::class_<Forest>& forest) {
  forest
      .def(
          "leaf_table",
          [](const Forest& f, const Handles& leaf) { return f.leaf_table(view(leaf)); }, "leaf_N"_a)
      .def(
          "tail_confidence",
          [](const Forest& f, const Handles& leaf, std::int64_t window) {
            return own(f.tail_confidence(view(leaf), window));
          },
          "leaf_N"_a, "window"_a)
      .def(
          "segments", [](const Forest& f, const Handles& leaf) { return f.segments(view(leaf)); },
          "leaf_N"_a)
      .def(
          "top_entropy",
          [](const Forest& f, std::int64_t branch, std::int64_t n, std::int64_t begin,
             std::int64_t end,
             std::int64_t min_gap) { return own(f.top_entropy(branch, n, begin, end, min_gap)); },
          "branch"_a, "n"_a, "begin"_a, "end"_a, "min_gap"_a)
      .def("pruned", &pruned, "tree"_a = py::none())
      .def("stats", &stats);
}

void bind_bytes(py::class_<Forest>& forest) {
  forest.def("check", &Forest::check)
      .def("save", [](const Forest& f) { return py::bytes(f.save()); })
      .def_static(
          "load", [](const py::bytes& b) { return Forest::load(static_cast<std::string_view>(b)); },
          "data"_a)
      .def(
          "__eq__", [](const Forest& a, const Forest& b) { return a == b; }, py::is_operator())
      .attr("__hash__") = py::none();
}

}  // namespace

// Every call on a forest holds the GIL, which is thereby its lock: several threads may use one.
static void bind_forest(py::module_& m) {
  bind_records(m);
  py::class_<Forest> forest(m, "Forest");
  bind_growth(forest);
  bind_branches(forest);
  bind_leaves(forest);
  bind_bytes(forest);
}

namespace {

template <typename T>
py::array_t<T> as_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

#define PYRL_COLUMN(name) \
  .def_property_readonly(#name "_B", [](const Observed& o) { return as_array(o.name); })

}  // namespace

static void bind_signals(py::module_& m) {
  py::class_<Threshold>(m, "Threshold")
      .def(py::init<double, double>(), "q"_a = -1.0, "value"_a = 0.0)
      .def_readonly("q", &Threshold::q)
      .def_readonly("value", &Threshold::value);

  py::class_<SignalSpec>(m, "SignalSpec")
      .def(py::init<>())
      .def_readwrite("smooth_window", &SignalSpec::smooth_window)
      .def_readwrite("group_window", &SignalSpec::group_window)
      .def_readwrite("tail_window", &SignalSpec::tail_window)
      .def_readwrite("min_tokens", &SignalSpec::min_tokens)
      .def_readwrite("warmup_traces", &SignalSpec::warmup_traces)
      .def_readwrite("history", &SignalSpec::history)
      .def_readwrite("fork", &SignalSpec::fork)
      .def_readwrite("entropy_high", &SignalSpec::entropy_high)
      .def_readwrite("entropy_low", &SignalSpec::entropy_low)
      .def_readwrite("confidence_fork", &SignalSpec::confidence_fork)
      .def_readwrite("entropy_rise", &SignalSpec::entropy_rise)
      .def_readwrite("alpha", &SignalSpec::alpha)
      .def_readwrite("beta", &SignalSpec::beta)
      .def_readwrite("width_min", &SignalSpec::width_min)
      .def_readwrite("width_max", &SignalSpec::width_max)
      .def_readwrite("cooldown", &SignalSpec::cooldown)
      .def_readwrite("max_forks", &SignalSpec::max_forks)
      .def_readwrite("prune", &SignalSpec::prune)
      .def_readwrite("confidence_low", &SignalSpec::confidence_low)
      .def_readwrite("tail_low", &SignalSpec::tail_low)
      .def_readwrite("entropy_spike", &SignalSpec::entropy_spike)
      .def_readwrite("decline_run", &SignalSpec::decline_run)
      .def_readwrite("spike_run", &SignalSpec::spike_run);

  py::class_<Observed>(m, "Observed") PYRL_COLUMN(smooth_entropy) PYRL_COLUMN(entropy_rise)
      PYRL_COLUMN(group_confidence) PYRL_COLUMN(tail_confidence) PYRL_COLUMN(min_confidence)
          PYRL_COLUMN(width) PYRL_COLUMN(prune) PYRL_COLUMN(ready);

  py::class_<Thresholds>(m, "Thresholds")
      .def_readonly("calibrated", &Thresholds::calibrated)
      .def_readonly("entropy_high", &Thresholds::entropy_high)
      .def_readonly("entropy_low", &Thresholds::entropy_low)
      .def_readonly("confidence_fork", &Thresholds::confidence_fork)
      .def_readonly("entropy_rise", &Thresholds::entropy_rise)
      .def_readonly("confidence_low", &Thresholds::confidence_low)
      .def_readonly("tail_low", &Thresholds::tail_low)
      .def_readonly("entropy_spike", &Thresholds::entropy_spike);

  py::class_<Sketch>(m, "Sketch")
      .def(py::init<int>(), "steps"_a = 4)
      .def(
          "add",
          [](Sketch& s, const array<double>& v) {
            for (double x : view(v)) s.add(x);
          },
          "values"_a)
      .def("next_step", &Sketch::next_step)
      .def("count", &Sketch::count)
      .def("quantile", &Sketch::quantile, "q"_a)
      .def("quantile_above", &Sketch::quantile_above, "q"_a);

  py::class_<Signals>(m, "Signals")
      .def(py::init<const SignalSpec&>(), "spec"_a)
      .def("begin_step", &Signals::begin_step)
      .def("calibrate", &Signals::calibrate)
      .def(
          "observe",
          [](Signals& s, const array<std::int64_t>& branch_B, const array<float>& entropy_B,
             const array<float>& confidence_B) {
            return s.observe(view(branch_B), view(entropy_B), view(confidence_B));
          },
          "branch_B"_a, "entropy_B"_a, "confidence_B"_a)
      .def(
          "inherit",
          [](Signals& s, std::int64_t parent, const array<std::int64_t>& child_B) {
            s.inherit(parent, view(child_B));
          },
          "parent"_a, "child_B"_a)
      .def(
          "rewind",
          [](Signals& s, std::int64_t branch, const array<float>& entropy_T,
             const array<float>& confidence_T) {
            s.rewind(branch, view(entropy_T), view(confidence_T));
          },
          "branch"_a, "entropy_T"_a, "confidence_T"_a)
      .def(
          "close", [](Signals& s, const array<std::int64_t>& branch_B) { s.close(view(branch_B)); },
          "branch_B"_a)
      .def("thresholds", &Signals::thresholds, py::return_value_policy::copy)
      .def("save", [](const Signals& s) { return py::bytes(s.save()); })
      .def("load", &Signals::load, "state"_a);
}

static void bind_without_replacement(py::module_& m) {
  py::class_<Growth>(m, "Growth")
      .def_property_readonly("parent_B", column(&Growth::parent))
      .def_property_readonly("log_mass_B", column(&Growth::log_mass))
      .def_property_readonly("gumbel_B", column(&Growth::gumbel))
      .def_property_readonly("dropped_B", column(&Growth::dropped));
  m.def(
      "draw_roots", [](Forest& f, const Handles& trunk) { draw_roots(f, view(trunk)); }, "forest"_a,
      "trunk_B"_a);
  m.def(
      "grow",
      [](Forest& f, std::int64_t votes, const Handles& branch, const array<float>& logprob,
         const array<float>& rest) {
        return grow(f, votes, {view(branch), view(logprob), view(rest)});
      },
      "forest"_a, "votes"_a, "branch_B"_a, "logprob_B"_a, "rest_logprob_B"_a);
  m.def("weigh", &weigh, "forest"_a);
}

static void bind_pack(py::module_& m) {
  py::class_<PackedRows>(m, "PackedRows")
      .def_property_readonly("input_I", column(&PackedRows::input))
      .def_property_readonly("position_I", column(&PackedRows::position))
      .def_property_readonly("cu_seqlens", column(&PackedRows::cu_seqlens))
      .def_property_readonly("label_T", column(&PackedRows::label))
      .def_property_readonly("leaf_T", column(&PackedRows::leaf))
      .def_property_readonly("segment_T", column(&PackedRows::segment))
      .def_property_readonly("logprob_T", column(&PackedRows::logprob))
      .def_property_readonly("entropy_T", column(&PackedRows::entropy))
      .def_property_readonly("confidence_T", column(&PackedRows::confidence))
      .def_property_readonly("forced_T", flag_column(&PackedRows::forced));
  m.def(
      "pack_flat",
      [](const Forest& forest, const array<std::int64_t>& leaf) {
        return pack_flat(forest, view(leaf));
      },
      "forest"_a, "leaf_N"_a);
}

static void bind_pack_tree(py::module_& m) {
  py::class_<PackedTree>(m, "PackedTree")
      .def_property_readonly("input_J", column(&PackedTree::input))
      .def_property_readonly("position_J", column(&PackedTree::position))
      .def_property_readonly("begin_S", column(&PackedTree::begin))
      .def_property_readonly("end_S", column(&PackedTree::end))
      .def_property_readonly("parent_S", column(&PackedTree::parent))
      .def_property_readonly("predictor_U", column(&PackedTree::predictor))
      .def_property_readonly("label_U", column(&PackedTree::label))
      .def_property_readonly("unique_T", column(&PackedTree::unique))
      .def_property_readonly("order_N", column(&PackedTree::order))
      .def_property_readonly("added_N", column(&PackedTree::added));
  m.def(
      "pack_tree",
      [](const Forest& forest, const array<std::int64_t>& leaf) {
        return pack_tree(forest, view(leaf));
      },
      "forest"_a, "leaf_N"_a);
  m.def(
      "pack_rows",
      [](const array<std::int64_t>& token, const array<std::int64_t>& offset,
         const array<std::int64_t>& prompt,
         bool share) { return pack_rows(view(token), view(offset), view(prompt), share); },
      "token_I"_a, "offset_N1"_a, "prompt_N"_a, "share"_a = true,
      py::call_guard<py::gil_scoped_release>());
  py::class_<BlockMask>(m, "BlockMask")
      .def_property_readonly("partial_count_B", column(&BlockMask::partial_count))
      .def_property_readonly("full_count_B", column(&BlockMask::full_count))
      .def_property_readonly("partial_BB", column(&BlockMask::partial))
      .def_property_readonly("full_BB", column(&BlockMask::full));
  m.def(
      "block_mask",
      [](const array<std::int64_t>& end, std::int64_t block) {
        return block_mask(view(end), block);
      },
      "end_J"_a, "block"_a = 128, py::call_guard<py::gil_scoped_release>());
}

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

Float group_advantage_of(const Int& group_N, const Float& reward_N,
                         const BaselineOptions& options) {
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
                            const Float& reward_N, const AncestorOptions& options) {
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

static void bind_advantage(py::module_& m) {
  bind_options<BaselineOptions>(m, "BaselineOptions");
  bind_options<AncestorOptions>(m, "AncestorOptions");
  m.def("group_advantage", &group_advantage_of, "group_N"_a, "reward_N"_a, "options"_a);
  m.def("group_mean", &group_mean_of, "group_N"_a, "value_N"_a);
  m.def("whiten", &whiten_of, "value_T"_a, "eps"_a);
  m.def("ancestor_advantage", &ancestor_advantage_of, "parent_S"_a, "leaf_segment_N"_a, "group_N"_a,
        "reward_N"_a, "options"_a);
  m.def("treerl_released_advantage", &treerl_released_advantage_of, "parent_S"_a, "length_S"_a,
        "leaf_segment_N"_a, "group_N"_a, "reward_N"_a, py::kw_only(), "by_token"_a);
}

void bind_tree(py::module_& m) {
  bind_forest(m);
  bind_signals(m);
  bind_without_replacement(m);
  bind_pack(m);
  bind_pack_tree(m);
  bind_advantage(m);
}

}  // namespace pyrl::bindings
