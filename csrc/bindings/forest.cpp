#include "tree/forest.h"

#include <optional>
#include <variant>

#include "bindings/bind.h"
#include "bindings/column.h"

namespace pyrl::bindings {

using namespace tree;
namespace {

using Handles = array<std::int64_t>;
using Release = py::call_guard<py::gil_scoped_release>;

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
      .def(
          "prompt",
          [](const Forest& f, std::int64_t tree) {
            const auto prompt = f.prompt(tree);
            return own(std::vector<std::int32_t>(prompt.begin(), prompt.end()));
          },
          "tree"_a)
      .def_property_readonly("trees", &Forest::trees)
      .def("path", &Forest::path, "branch"_a, Release())
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
          [](const Forest& f, const Handles& leaf) { return f.leaf_table(view(leaf)); }, "leaf_N"_a,
          Release())
      .def(
          "tail_confidence",
          [](const Forest& f, const Handles& leaf, std::int64_t window) {
            return own(f.tail_confidence(view(leaf), window));
          },
          "leaf_N"_a, "window"_a)
      .def(
          "segments", [](const Forest& f, const Handles& leaf) { return f.segments(view(leaf)); },
          "leaf_N"_a, Release())
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
  forest.def("check", &Forest::check, Release())
      .def("save", [](const Forest& f) { return py::bytes(f.save()); })
      .def_static(
          "load", [](const py::bytes& b) { return Forest::load(static_cast<std::string_view>(b)); },
          "data"_a)
      .def(
          "__eq__", [](const Forest& a, const Forest& b) { return a == b; }, py::is_operator())
      .attr("__hash__") = py::none();
}

}  // namespace

void bind_forest(py::module_& m) {
  bind_records(m);
  py::class_<Forest> forest(m, "Forest");
  bind_growth(forest);
  bind_branches(forest);
  bind_leaves(forest);
  bind_bytes(forest);
}

}  // namespace pyrl::bindings
