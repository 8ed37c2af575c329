// Columns of statistics by their names: addresses of T doubles, as the core reads them.
#pragma once

#include "bindings/bind.h"
#include "logits/stats/token_stats.h"

namespace pyrl::bindings {

// Sets the columns that are named.
template <typename T>
void set_columns(const py::dict& address_of_name, T* (&column_of_stat)[logits::stats::kStats]) {
  std::size_t known = 0;
  for (int stat = 0; stat < logits::stats::kStats; ++stat) {
    const char* name = logits::stats::kStatNames[stat];
    PyObject* address = PyDict_GetItemString(address_of_name.ptr(), name);
    if (address == nullptr) continue;
    column_of_stat[stat] = pointer<T>(py::handle(address).cast<std::uintptr_t>());
    ++known;
  }
  PYRL_CHECK(known == address_of_name.size(), "expected statistics of token_stats, got ",
             std::string(py::str(address_of_name)));
}

}  // namespace pyrl::bindings
