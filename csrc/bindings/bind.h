// One function a folder of csrc/; module.cpp calls them in the order of the data path.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "base/check.h"

namespace pyrl::bindings {

namespace py = pybind11;
using namespace pybind11::literals;

void bind_tree(py::module_& m);
void bind_logits(py::module_& m);
void bind_loss(py::module_& m);
// Types of the core, that another module with its kernels shares.
void bind_loss_records(py::module_& m);

// A C-contiguous array argument; of another layout, or of a type that converts safely, a copy.
template <typename T>
using array = py::array_t<T, py::array::c_style>;

// Of one axis: a padded matrix would pass for a longer row.
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

#ifndef PYRL_WITH_CUDA
[[noreturn]] inline void no_cuda_kernels(const std::string& function) {
  throw std::runtime_error(
      function +
      ": expected a build with CUDA kernels for a CUDA tensor, got one for the CPU only");
}
#endif

}  // namespace pyrl::bindings
