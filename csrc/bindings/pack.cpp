#include "tree/pack.h"

#include "bindings/bind.h"
#include "bindings/column.h"

namespace pyrl::bindings {

using namespace tree;

void bind_pack(py::module_& m) {
  py::class_<PackedRows>(m, "PackedRows")
      .def_property_readonly("input_I", column(&PackedRows::input))
      .def_property_readonly("position_I", column(&PackedRows::position))
      .def_property_readonly("cu_seqlens", column(&PackedRows::cu_seqlens))
      .def_property_readonly("predictor_T", column(&PackedRows::predictor))
      .def_property_readonly("label_T", column(&PackedRows::label))
      .def_property_readonly("leaf_T", column(&PackedRows::leaf))
      .def_property_readonly("segment_T", column(&PackedRows::segment))
      .def_property_readonly("logprob_T", column(&PackedRows::logprob))
      .def_property_readonly("entropy_T", column(&PackedRows::entropy))
      .def_property_readonly("confidence_T", column(&PackedRows::confidence))
      .def_property_readonly("forced_T", flag_column(&PackedRows::forced))
      .def_property_readonly("version_T", column(&PackedRows::version));
  m.def(
      "pack_flat",
      [](const Forest& forest, const array<std::int64_t>& leaf) {
        return pack_flat(forest, view(leaf));
      },
      "forest"_a, "leaf_N"_a, py::call_guard<py::gil_scoped_release>());
}

}  // namespace pyrl::bindings
