// Splits independent work over parked threads. Each item is computed by one thread from its own
// data, so results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace pyrl {

// Runs run(part) for every part in [0, parts), on the caller and on parked threads. Rethrows the
// failure of the lowest part. While another thread has the pool, the caller works alone: nested
// and concurrent calls cannot wait for each other. A child of fork() starts threads of its own.
void run_parts(int parts, const std::function<void(int)>& run);

// Below this many elements (some 0.1 ms) waking a thread costs more than it saves.
inline constexpr std::int64_t kElementsPerThread = 1 << 19;

// Calls body(begin, end) for contiguous ranges that cover [0, rows), on at most `threads` threads.
template <typename Body>
void parallel_rows(std::int64_t rows, std::int64_t elements_per_row, int threads, Body&& body) {
  const std::int64_t worth = rows * elements_per_row / kElementsPerThread;
  const std::int64_t parts =
      std::clamp<std::int64_t>(std::min(worth, rows), 1, std::max(1, threads));
  if (parts == 1) return body(std::int64_t{0}, rows);
  run_parts(static_cast<int>(parts),
            [&](int part) { body(rows * part / parts, rows * (part + 1) / parts); });
}

}  // namespace pyrl
