// What was expected and what was found, in one message; Python sees a ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pyrl {

// A handle whose branch or tree was freed (Python: pyrl.StaleHandleError, a LookupError).
struct StaleHandle : std::out_of_range {
  using std::out_of_range::out_of_range;
};

}  // namespace pyrl

// PYRL_CHECK(keep <= length, "fork: expected keep <= ", length, ", got ", keep);
#define PYRL_CHECK(condition, ...)                            \
  do {                                                        \
    if (!(condition)) [[unlikely]]                            \
      throw std::invalid_argument(::pyrl::text(__VA_ARGS__)); \
  } while (false)

namespace pyrl {

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace pyrl
