// Reads columns of the tokens that take part, block by block, and reduces them.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "base/check.h"
#include "loss/column.h"

namespace pyrl::loss {

// Up to kTokenBlock tokens. `used` is 1 or 0.
struct TokenBlock {
  std::size_t begin;
  int n;
  double used[kTokenBlock];
  double buffer[8][kTokenBlock];
  int buffers = 0;

  const double* operator()(const Column& column) {
    return read(column, begin, n, buffer[buffers++]);
  }
  double* work() { return buffer[buffers++]; }
};

template <typename Visit>
void visit_tokens(const Responses& responses, std::size_t begin, std::size_t end, Visit visit) {
  for_blocks(begin, end, [&](std::size_t t, int n) {
    TokenBlock block;
    block.begin = t;
    block.n = n;
    for (int i = 0; i < n; ++i)
      block.used[i] = responses.mask_T ? (responses.mask_T[t + i] ? 1.0 : 0.0) : 1.0;
    visit(block);
  });
}

template <typename Visit>
void visit_tokens(const Responses& responses, Visit visit) {
  visit_tokens(responses, 0, responses.tokens, visit);
}

// Calls visit(leaf, begin, end).
template <typename Visit>
void visit_leaves(const Responses& responses, Visit visit) {
  for (std::size_t leaf = 0; leaf < responses.leaves; ++leaf)
    visit(leaf, static_cast<std::size_t>(responses.offset_N1[leaf]),
          static_cast<std::size_t>(responses.offset_N1[leaf + 1]));
}

inline double count_tokens(const Responses& responses, std::size_t begin, std::size_t end) {
  if (!responses.mask_T) return static_cast<double>(end - begin);
  std::int64_t count = 0;
  for (std::size_t t = begin; t < end; ++t) count += responses.mask_T[t] != 0;
  return static_cast<double>(count);
}

// Sum over tokens that take part of what `value(block, out)` writes for each.
template <typename Value>
double sum_tokens(const Responses& responses, std::size_t begin, std::size_t end, Value value) {
  LaneSum sum;
  visit_tokens(responses, begin, end, [&](TokenBlock& block) {
    double* out = block.work();
    value(block, out);
    for (int i = 0; i < block.n; ++i) out[i] = block.used[i] != 0 ? out[i] : 0.0;
    add(sum, out, block.n);
  });
  return total(sum);
}

struct Moments {
  double mean = 0, squares = 0, count = 0;  // squares: sum of (x - mean)^2

  double population() const { return count > 0 ? std::sqrt(squares / count) : 0.0; }
  double unbiased() const { return count > 1 ? std::sqrt(squares / (count - 1)) : 0.0; }
};

// 0 without a token.
template <typename Value>
double mean(const Responses& responses, Value value) {
  const double count = count_tokens(responses, 0, responses.tokens);
  return count > 0 ? sum_tokens(responses, 0, responses.tokens, value) / count : 0.0;
}

template <typename Value>
Moments moments(const Responses& responses, Value value) {
  Moments result;
  result.count = count_tokens(responses, 0, responses.tokens);
  result.mean = mean(responses, value);
  result.squares = sum_tokens(responses, 0, responses.tokens, [&](TokenBlock& block, double* out) {
    value(block, out);
    for (int i = 0; i < block.n; ++i) out[i] = (out[i] - result.mean) * (out[i] - result.mean);
  });
  return result;
}

// The column as a value of `moments` and `sum_tokens`.
inline auto value_of(const Column& column) {
  return [&column](TokenBlock& block, double* out) {
    const double* x = block(column);
    for (int i = 0; i < block.n; ++i) out[i] = x[i];
    --block.buffers;
  };
}

struct Candidate {
  double value;
  std::size_t t;
};

inline void check_ordered(const char* name, double value, std::size_t t) {
  PYRL_CHECK(!std::isnan(value), name, ": expected numbers, got nan at ", t);
}

inline std::vector<double> used_values(const char* name, const Column& column,
                                       const Responses& responses, std::size_t begin,
                                       std::size_t end) {
  std::vector<double> values(end - begin);
  std::size_t size = 0;
  for_blocks(begin, end, [&](std::size_t t, int n) {
    double buffer[kTokenBlock];
    const double* x = read(column, t, n, buffer);
    double* out = values.data() + size;
    if (responses.mask_T) {
      for (int i = 0; i < n; ++i) {
        *out = x[i];
        out += responses.mask_T[t + static_cast<std::size_t>(i)] != 0;
      }
    } else {
      out = std::copy(x, x + n, out);
    }
    size = static_cast<std::size_t>(out - values.data());
  });
  values.resize(size);
  int unordered = 0;
  for (const double x : values) unordered |= x != x;
  for (std::size_t t = begin; unordered && t < end; ++t)
    if (responses.used(t)) check_ordered(name, column[t], t);
  return values;
}

struct Range {
  double least = std::numeric_limits<double>::infinity();
  double most = -std::numeric_limits<double>::infinity();
};

inline Range range_of(const std::vector<double>& values) {
  Range lane[kLanes];
  std::size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes)
    for (std::size_t j = 0; j < kLanes; ++j) {
      lane[j].least = std::min(lane[j].least, values[i + j]);
      lane[j].most = std::max(lane[j].most, values[i + j]);
    }
  for (; i < values.size(); ++i) {
    lane[0].least = std::min(lane[0].least, values[i]);
    lane[0].most = std::max(lane[0].most, values[i]);
  }
  for (const Range& other : lane) {
    lane[0].least = std::min(lane[0].least, other.least);
    lane[0].most = std::max(lane[0].most, other.most);
  }
  return lane[0];
}

// Grows with the number, which is not NaN.
inline std::uint64_t key_of(double x) {
  std::uint64_t bits;
  x += 0.0;  // -0 and 0 are one number
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ (bits >> 63 ? ~std::uint64_t{0} : std::uint64_t{1} << 63);
}

// The least number with this key.
inline double number_of(std::uint64_t key) {
  const std::uint64_t bits = key ^ (key >> 63 ? std::uint64_t{1} << 63 : ~std::uint64_t{0});
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The values at ranks k (from 0) and k + 1 (at the last: the same); may reorder the values.
inline std::pair<double, double> ranked(std::vector<double>& values, std::size_t k) {
  const auto among = [](std::vector<double>& some, std::size_t rank) {
    const auto kth = some.begin() + static_cast<std::ptrdiff_t>(rank);
    std::nth_element(some.begin(), kth, some.end());
    const auto next = std::min_element(kth + 1, some.end());
    return std::pair{*kth, next == some.end() ? *kth : *next};
  };
  if (values.size() <= 1 << 14) return among(values, k);
  // Of many, only those whose leading 16 bits (an octave in 16 parts) are those of the k-th.
  std::vector<std::uint32_t> count(1 << 16);
  for (const double x : values) ++count[key_of(x) >> 48];
  std::size_t rank = k;
  std::uint64_t part = 0;
  for (; count[part] <= rank; ++part) rank -= count[part];
  // If the k-th is the last of its part, the next is the least of the part that follows.
  std::uint64_t last = part;
  if (rank + 1 == count[part] && k + 1 < values.size())
    while (count[++last] == 0) {
    }
  const double low = number_of(part << 48), high = number_of((last + 1) << 48);
  std::vector<double> near(count[part] + (last > part ? count[last] : 0) + 1);
  std::size_t size = 0;
  for (const double x : values) {
    near[size] = x;
    size += !(x < low) & !(x >= high);  // next to an infinity the end is NaN
  }
  near.pop_back();
  return among(near, rank);
}

// Linear interpolation between order statistics; reorders the values, of which there is one.
inline double linear_quantile(std::vector<double>& values, double q) {
  PYRL_CHECK(q >= 0 && q <= 1, "quantile: expected a number in [0, 1], got ", q);
  const double position = q * static_cast<double>(values.size() - 1);
  const auto low = static_cast<std::size_t>(position);
  const auto [below, above] = ranked(values, low);
  return below + (position - static_cast<double>(low)) * (above - below);
}

// Smallest value with at least a share q of the values at or below it.
inline double nearest_rank(std::vector<double>& values, double q) {
  const double rank = std::ceil(q * static_cast<double>(values.size()) - 1e-9);
  return ranked(values, static_cast<std::size_t>(std::max(rank, 1.0)) - 1).first;
}

// Marks the k candidates of least value; equal ones by index.
inline void mark_least(std::vector<Candidate>& candidates, std::size_t k, std::uint8_t mark,
                       std::uint8_t* mark_T) {
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.value != b.value ? a.value < b.value : a.t < b.t;
  };
  k = std::min(k, candidates.size());
  std::nth_element(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(k),
                   candidates.end(), before);
  for (std::size_t i = 0; i < k; ++i) mark_T[candidates[i].t] = mark;
}

inline std::size_t share_of(double share, double count) {
  PYRL_CHECK(share >= 0 && share <= 1, "share: expected a number in [0, 1], got ", share);
  return static_cast<std::size_t>(std::max(share * count, 1.0));
}

}  // namespace pyrl::loss
