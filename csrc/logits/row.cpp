#include "logits/row.h"

#include "base/check.h"

namespace pyrl::logits {

double exponent_scale(double temperature) {
  const double scale = std::numbers::log2e / temperature;
  PYRL_CHECK(temperature > 0 && std::isfinite(temperature) && scale <= 1e30,
             "temperature: expected a finite number > 0, got ", temperature);
  return scale;
}

}  // namespace pyrl::logits
