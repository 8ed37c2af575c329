// One function a folder of csrc/; module.cpp calls them in the order of the data path.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "base/check.h"

namespace pyrl::bindings {

namespace py = pybind11;
using namespace pybind11::literals;

void bind_tree(py::module_& m);
void bind_logit_records(py::module_& m);
void bind_logits(py::module_& m);
void bind_loss(py::module_& m);
// Types of the core, that another module with its kernels shares.
void bind_loss_records(py::module_& m);

// A C-contiguous array argument; of another layout, or of a type that converts safely, a copy.
template <typename T>
using array = py::array_t<T, py::array::c_style>;

// An array with one axis: a padded matrix would pass for a longer row.
template <typename T>
std::span<const T> view(const array<T>& values) {
  PYRL_CHECK(values.ndim() == 1, "expected an array with one axis, got ", values.ndim());
  return {values.data(), static_cast<std::size_t>(values.size())};
}

template <typename T>
std::span<T> view_mutable(array<T>& values) {
  return {values.mutable_data(), static_cast<std::size_t>(values.size())};
}

// A tensor's data: torch's addresses pass as integers, so that the core does not know torch.
template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A field of a record: an enumeration by the name that the core's `read` knows.
template <typename T>
void read_field(const char* name, py::handle value, T& field) {
  try {
    if constexpr (std::is_enum_v<T>) {
      read(value.cast<std::string>(), field);
    } else {
      field = value.cast<T>();
    }
  } catch (const py::cast_error&) {
    const char* kind = std::is_enum_v<T>       ? "a name"
                       : std::is_integral_v<T> ? "a whole number"
                                               : "a number";
    throw py::type_error(text(name, ": expected ", kind, ", got ", std::string(py::repr(value))));
  }
}

// A record of options, made in one call: its fields are the keywords of the constructor, and one
// that is not given keeps its default. Names and types are those of Record::each_field.
template <typename Record>
void bind_options(py::module_& m, const char* name) {
  py::list names;
  Record::each_field([&](const char* field, auto) { names.append(field); });
  const auto made = [name, names](const py::kwargs& given) {
    Record record;
    std::size_t known = 0;
    Record::each_field([&](const char* field, auto member) {
      PyObject* value = PyDict_GetItemString(given.ptr(), field);
      if (value == nullptr) return;
      read_field(field, value, record.*member);
      ++known;
    });
    if (known == given.size()) return record;
    throw py::type_error(text(name, ": expected fields of ", std::string(py::str(names)), ", got ",
                              std::string(py::str(given))));
  };
  py::class_<Record>(m, name).def(py::init(made)).attr("fields") = py::tuple(names);
}

#ifndef PYRL_WITH_CUDA
[[noreturn]] inline void no_cuda_kernels(const std::string& function) {
  throw std::runtime_error(
      function +
      ": expected a build with CUDA kernels for a CUDA tensor, got one for the CPU only");
}
#endif

}  // namespace pyrl::bindings
