#include "base/isa.h"
#include "bindings/bind.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = PYRL_VERSION;
  info["compiler"] = __VERSION__;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["isa"] = pyrl::isa_name(pyrl::isa());
#ifdef PYRL_WITH_CUDA
  info["cuda"] = PYRL_CUDA_VERSION;
#else
  info["cuda"] = pybind11::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  pyrl::isa();  // a wrong PYRL_ISA fails here
  m.def("build_info", &build_info,
        "How this extension was compiled (cuda is None without kernels) and the instruction set it "
        "uses.");
  auto tree = m.def_submodule("tree", "Forest, signals, rows and advantages.");
  auto logits = m.def_submodule("logits", "Statistics of rows of logits, and the draw of a token.");
  auto loss = m.def_submodule("loss", "The policy loss.");
  pybind11::register_exception<pyrl::StaleHandle>(m, "StaleHandleError", PyExc_LookupError);
  pyrl::bindings::bind_tree(tree);
  pyrl::bindings::bind_logit_records(logits);
  pyrl::bindings::bind_logits(logits);
  pyrl::bindings::bind_loss_records(loss);
  pyrl::bindings::bind_loss(loss);
}
