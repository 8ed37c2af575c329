// Splits independent rows over threads. Each row is computed by one thread from its own data, so
// results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace pyrl {

// Below this many elements (about half a millisecond) a thread costs more than it saves.
inline constexpr std::int64_t kElementsPerThread = 1 << 19;

// Calls body(begin, end) for contiguous ranges that cover [0, rows), on at most `threads` threads.
// Threads live as long as the call: nothing is left behind for a process that forks.
template <typename Body>
void parallel_rows(std::int64_t rows, std::int64_t elements_per_row, int threads, Body&& body) {
  const std::int64_t worth = rows * elements_per_row / kElementsPerThread;
  const std::int64_t parts =
      std::clamp<std::int64_t>(std::min(worth, rows), 1, std::max(1, threads));
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(parts));
  const auto run = [&](std::int64_t part) {
    try {
      body(rows * part / parts, rows * (part + 1) / parts);
    } catch (...) {
      failures[static_cast<std::size_t>(part)] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (std::int64_t part = 1; part < parts; ++part) others.emplace_back(run, part);
  run(0);
  for (std::thread& other : others) other.join();
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

}  // namespace pyrl
