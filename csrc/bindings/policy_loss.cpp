#include "bindings/bind.h"

namespace pyrl {

void bind_policy_loss(py::module_& m) { static_cast<void>(m); }

}  // namespace pyrl
