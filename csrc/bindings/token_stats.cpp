#include "bindings/bind.h"

namespace pyrl {

void bind_token_stats(py::module_& m) { static_cast<void>(m); }

}  // namespace pyrl
