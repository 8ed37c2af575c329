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

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  pyrl::isa();  // a wrong PYRL_ISA fails here
  m.def("build_info", &build_info,
        "How this extension was compiled (cuda is None without kernels) and the instruction set it "
        "uses.");
  pybind11::register_exception<pyrl::StaleHandle>(m, "StaleHandleError", PyExc_LookupError);
  pyrl::bindings::bind_forest(m);
  pyrl::bindings::bind_signals(m);
  pyrl::bindings::bind_advantage(m);
  pyrl::bindings::bind_pack(m);
  pyrl::bindings::bind_sample_tokens(m);
  pyrl::bindings::bind_token_stats(m);
  pyrl::bindings::bind_policy_loss(m);
  pyrl::bindings::bind_policy_terms(m);
  pyrl::bindings::bind_fused_loss(m);
}
