// Arrays of one number per token, float32 or float64, as the core reads them. Nothing is copied.
#pragma once

#include "bindings/bind.h"
#include "loss/column.h"

namespace pyrl::bindings {

using namespace loss;

inline Column column_of(const std::string& name, const py::array& values, std::size_t tokens) {
  const bool narrow = py::isinstance<py::array_t<float>>(values);
  const bool wide = py::isinstance<py::array_t<double>>(values);
  PYRL_CHECK(narrow || wide, name, ": expected float32 or float64, got ",
             std::string(py::str(static_cast<const py::object&>(values.dtype()))));
  PYRL_CHECK(values.ndim() == 1 && static_cast<std::size_t>(values.size()) == tokens, name,
             ": expected ", tokens, " entries, got ", values.size(), " in ", values.ndim(),
             " axes");
  PYRL_CHECK(values.flags() & py::array::c_style, name,
             ": expected a contiguous array, got strides of ", values.strides(0), " bytes");
  Column column;
  if (narrow) column.narrow = static_cast<const float*>(values.data());
  if (wide) column.wide = static_cast<const double*>(values.data());
  return column;
}

// A tensor's column: its address, and the bytes of a number, 4 or 8; {0, 0} for none.
using ColumnAddress = std::pair<std::uintptr_t, int>;

inline Column column_at(const ColumnAddress& column) {
  const auto [address, size] = column;
  Column found;
  if (size == 4) found.narrow = pointer<const float>(address);
  if (size == 8) found.wide = pointer<const double>(address);
  return found;
}

using MaskArray = std::optional<array<bool>>;
using OffsetArray = std::optional<array<std::int64_t>>;

// Without offsets there are no responses: only what is local to a token can be computed.
inline Responses responses_of(std::size_t tokens, const MaskArray& mask_T,
                              const OffsetArray& offset_N1) {
  Responses responses;
  responses.tokens = tokens;
  if (mask_T) {
    PYRL_CHECK(static_cast<std::size_t>(mask_T->size()) == tokens, "mask_T: expected ", tokens,
               " entries, got ", mask_T->size());
    responses.mask_T = reinterpret_cast<const std::uint8_t*>(mask_T->data());
  }
  if (!offset_N1) return responses;
  const std::int64_t* offset = offset_N1->data();
  const auto leaves = offset_N1->size() - 1;
  PYRL_CHECK(leaves >= 0, "offset_N1: expected offsets from 0 to ", tokens, ", got none");
  PYRL_CHECK(offset[0] == 0 && offset[leaves] == static_cast<std::int64_t>(tokens),
             "offset_N1: expected offsets from 0 to ", tokens, ", got ", offset[0], " to ",
             offset[leaves]);
  for (py::ssize_t leaf = 0; leaf < leaves; ++leaf)
    PYRL_CHECK(offset[leaf] <= offset[leaf + 1],
               "offset_N1: expected offsets that do not fall, got ", offset[leaf], " before ",
               offset[leaf + 1]);
  responses.offset_N1 = offset;
  responses.leaves = static_cast<std::size_t>(leaves);
  return responses;
}

}  // namespace pyrl::bindings
