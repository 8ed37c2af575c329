// A C++ column as a numpy array without a copy: the array keeps the record that owns it alive.
#pragma once

#include <vector>

#include "bindings/bind.h"

namespace pyrl::bindings {

template <typename Record, typename Values>
auto column(Values Record::* field) {
  return [field](const py::object& record) {
    Values& values = record.cast<Record&>().*field;
    return py::array_t<typename Values::value_type>(static_cast<py::ssize_t>(values.size()),
                                                    values.data(), record);
  };
}

// Bytes 0 and 1 as booleans.
template <typename Record>
auto flag_column(std::vector<std::uint8_t> Record::* field) {
  return [field](const py::object& record) {
    std::vector<std::uint8_t>& values = record.cast<Record&>().*field;
    return py::array(py::dtype::of<bool>(), {values.size()}, {1}, values.data(), record);
  };
}

// A fresh array that takes the values over.
template <typename T>
py::array_t<T> own(std::vector<T>&& values) {
  auto* kept = new std::vector<T>(std::move(values));
  const py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

}  // namespace pyrl::bindings
