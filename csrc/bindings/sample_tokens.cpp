#include "bindings/bind.h"

namespace pyrl {

void bind_sample_tokens(py::module_& m) { static_cast<void>(m); }

}  // namespace pyrl
