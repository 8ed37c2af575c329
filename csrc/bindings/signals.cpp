#include "tree/signals.h"

#include "bindings/bind.h"

namespace pyrl::bindings {

using namespace tree;

namespace {

template <typename T>
py::array_t<T> as_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

#define PYRL_COLUMN(name) \
  .def_property_readonly(#name "_B", [](const Observed& o) { return as_array(o.name); })

}  // namespace

void bind_signals(py::module_& m) {
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

}  // namespace pyrl::bindings
