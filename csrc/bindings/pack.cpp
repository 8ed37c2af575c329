#include "bindings/bind.h"

namespace pyrl {

void bind_pack(py::module_& m) { static_cast<void>(m); }

}  // namespace pyrl
