#include "sample_tokens.h"

#include <string>
#include <vector>

#include "check.h"
#include "row_summary.h"
#include "thread_pool.h"

namespace pyrl {
namespace {

struct Candidate {
  double z;
  double weight;
  std::int32_t token;
};

// The more probable first; equal ones by id.
bool precedes(const Candidate& a, const Candidate& b) {
  return a.z != b.z ? a.z > b.z : a.token < b.token;
}

// Work space of one thread.
struct Workspace {
  std::vector<RowSums> blocks;
  std::vector<Candidate> candidates;  // in vocabulary order
  std::vector<Candidate> scratch;
};

template <typename Element>
struct Row {
  const Element* z;
  std::int64_t vocabulary;
  double scale;
  RowSums sums;
};

template <typename Element>
std::int32_t argmax(const Row<Element>& row) {
  std::int64_t token = 0;
  while (static_cast<double>(widen_one(row.z[token])) != row.sums.maximum) ++token;
  return static_cast<std::int32_t>(token);
}

// The first token of the block whose cumulative weight exceeds `target`; rounding may leave none,
// then the last token with any weight.
template <typename Element>
std::int32_t draw_in_block(const Row<Element>& row, std::int64_t begin, double maximum,
                           double target) {
  using R = Real<Element>;
  R buffer[kBlock], weight[kBlock];
  const int n = static_cast<int>(std::min<std::int64_t>(kBlock, row.vocabulary - begin));
  const R* z = widen(row.z + begin, n, buffer);
  block_weights(z, weight, n, static_cast<R>(maximum), static_cast<R>(row.scale));
  double cumulative = 0;
  int last = 0;
  for (int i = 0; i < n; ++i) {
    if (weight[i] == 0) continue;
    last = i;
    cumulative += static_cast<double>(weight[i]);
    if (cumulative > target) break;
  }
  return static_cast<std::int32_t>(begin + last);
}

// Inverse distribution function in vocabulary order: whole blocks first, then inside one.
template <typename Element>
std::int32_t draw(const Row<Element>& row, std::span<const RowSums> blocks, double uniform) {
  double target = uniform * row.sums.sum;
  std::size_t chosen = 0;
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    const double mass = blocks[b].shifted(row.sums.maximum, row.scale).sum;
    if (mass == 0) continue;
    chosen = b;
    if (target < mass) break;
    target -= mass;
  }
  const double factor = std::exp2((blocks[chosen].maximum - row.sums.maximum) * row.scale);
  return draw_in_block(row, static_cast<std::int64_t>(chosen) * kBlock, blocks[chosen].maximum,
                       target / factor);
}

// Tokens with z >= floor in vocabulary order; returns their mass.
template <typename Element>
double gather(const Row<Element>& row, std::span<const RowSums> blocks, double floor,
              std::vector<Candidate>& out) {
  using R = Real<Element>;
  R buffer[kBlock];
  out.clear();
  double mass = 0;
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    if (blocks[b].sum == 0 || blocks[b].maximum < floor) continue;
    const std::int64_t begin = static_cast<std::int64_t>(b) * kBlock;
    const int n = static_cast<int>(std::min<std::int64_t>(kBlock, row.vocabulary - begin));
    const R* z_block = widen(row.z + begin, n, buffer);
    for (int i = 0; i < n; ++i) {
      const double z = static_cast<double>(z_block[i]);
      if (z < floor || z == kMinusInfinity) continue;
      const double weight = std::exp2((z - row.sums.maximum) * row.scale);
      out.push_back({z, weight, static_cast<std::int32_t>(begin + i)});
      mass += weight;
    }
  }
  return mass;
}

// A superset of the tokens that top-k and top-p keep, found without sorting the vocabulary: the
// floor sinks until enough tokens (top-k) or enough mass (top-p) lie above it.
template <typename Element>
void gather_superset(const Row<Element>& row, std::span<const RowSums> blocks,
                     const Truncation& truncation, std::vector<Candidate>& out) {
  if (truncation.min_p > 0) {
    gather(row, blocks, row.sums.maximum + std::log2(truncation.min_p) / row.scale, out);
    return;
  }
  const std::size_t top_k = static_cast<std::size_t>(truncation.top_k);
  for (const double depth : {6.0, 12.0, 24.0, 48.0}) {
    const double mass = gather(row, blocks, row.sums.maximum - depth / row.scale, out);
    // The margin covers the rounding of row.sums against the weights of the candidates.
    const bool enough =
        top_k > 0 ? out.size() >= top_k : mass >= (truncation.top_p + 1e-5) * row.sums.sum;
    if (enough) return;
  }
  gather(row, blocks, kMinusInfinity, out);
}

// Of the candidates in order of precedence, the first that lifts the cumulative mass to `target`:
// quickselect by mass, so that a flat distribution is not sorted either. Reorders them.
Candidate crossing(std::span<Candidate> candidates, double target) {
  auto begin = candidates.begin(), end = candidates.end();
  while (end - begin > 64) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, precedes);
    double mass = 0;
    for (auto candidate = begin; candidate != middle; ++candidate) mass += candidate->weight;
    if (mass >= target) {
      end = middle;
    } else {
      target -= mass;
      begin = middle;
    }
  }
  std::sort(begin, end, precedes);
  while (begin + 1 != end && begin->weight < target) target -= (begin++)->weight;
  return *begin;
}

void drop_after(const Candidate& last, std::vector<Candidate>& candidates) {
  std::erase_if(candidates, [&](const Candidate& other) { return precedes(last, other); });
}

// Leaves the tokens that top-k and top-p keep, in vocabulary order.
void truncate(const Truncation& truncation, double row_mass, Workspace& space) {
  std::vector<Candidate>& candidates = space.candidates;
  const std::size_t top_k = static_cast<std::size_t>(truncation.top_k);
  if (top_k > 0 && top_k < candidates.size()) {
    space.scratch = candidates;
    const auto last = space.scratch.begin() + truncation.top_k - 1;
    std::nth_element(space.scratch.begin(), last, space.scratch.end(), precedes);
    drop_after(*last, candidates);
  }
  if (truncation.top_p == 1) return;
  double mass = row_mass;
  if (top_k > 0 || truncation.min_p > 0) {
    mass = 0;
    for (const Candidate& candidate : candidates) mass += candidate.weight;
  }
  space.scratch = candidates;
  drop_after(crossing(space.scratch, truncation.top_p * mass), candidates);
}

std::int32_t draw_candidate(std::span<const Candidate> candidates, double uniform) {
  double total = 0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  double cumulative = 0;
  for (const Candidate& candidate : candidates) {
    cumulative += candidate.weight;
    if (cumulative > uniform * total) return candidate.token;
  }
  return candidates.back().token;
}

template <typename Element>
std::int32_t choose(const Row<Element>& row, const Truncation& truncation, double uniform,
                    Workspace& space) {
  if (truncation.temperature == 0) return argmax(row);
  if (truncation.top_k == 0 && truncation.top_p == 1 && truncation.min_p == 0) {
    return draw(row, space.blocks, uniform);
  }
  gather_superset(row, space.blocks, truncation, space.candidates);
  truncate(truncation, row.sums.sum, space);
  return draw_candidate(space.candidates, uniform);
}

template <typename Element>
void sample_row(const Element* z, std::int64_t vocabulary, const Truncation& truncation,
                std::size_t b, std::span<const double> uniform_B, Workspace& space,
                const SampledTokens& out) {
  const double temperature = truncation.temperature == 0 ? 1.0 : truncation.temperature;
  const double scale = exponent_scale(temperature);
  const auto summary = summarize(z, vocabulary, scale, space.blocks.data());
  if (!summary.valid || summary.sums.sum == 0) {
    out.token_B[b] = -1;
    return;
  }
  const RowSums& sums = summary.sums;
  const Row<Element> row{z, vocabulary, scale, sums};
  const std::int32_t token = choose(row, truncation, uniform_B[b], space);
  const double z_token = static_cast<double>(widen_one(z[token]));
  out.token_B[b] = token;
  out.logprob_B[b] = static_cast<float>(sums.logprob(z_token, temperature));
  out.entropy_B[b] = static_cast<float>(sums.entropy());
  out.confidence_B[b] = static_cast<float>(summary.confidence(scale));
}

void check_truncation(const Truncation& truncation) {
  if (truncation.temperature != 0) static_cast<void>(exponent_scale(truncation.temperature));
  PYRL_CHECK(truncation.top_k >= 0, "top_k: expected >= 0, got ", truncation.top_k);
  PYRL_CHECK(truncation.top_p > 0 && truncation.top_p <= 1, "top_p: expected 0 < top_p <= 1, got ",
             truncation.top_p);
  PYRL_CHECK(truncation.min_p >= 0 && truncation.min_p < 1, "min_p: expected 0 <= min_p < 1, got ",
             truncation.min_p);
}

}  // namespace

double uniform(std::uint64_t seed, std::uint64_t position) {
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  std::uint32_t counter[4] = {static_cast<std::uint32_t>(position),
                              static_cast<std::uint32_t>(position >> 32), 0, 0};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t second = std::uint64_t{0xCD9E8D57} * counter[2];
    const std::uint32_t mixed0 = static_cast<std::uint32_t>(second >> 32) ^ counter[1] ^ key[0];
    const std::uint32_t mixed2 = static_cast<std::uint32_t>(first >> 32) ^ counter[3] ^ key[1];
    counter[0] = mixed0;
    counter[1] = static_cast<std::uint32_t>(second);
    counter[2] = mixed2;
    counter[3] = static_cast<std::uint32_t>(first);
    key[0] += 0x9E3779B9;  // the golden ratio
    key[1] += 0xBB67AE85;  // sqrt(3) - 1
  }
  const std::uint64_t bits = (static_cast<std::uint64_t>(counter[0]) << 32) | counter[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

void uniforms(std::span<const std::uint64_t> seed_B, std::span<const std::int64_t> position_B,
              std::span<double> uniform_B) {
  PYRL_CHECK(seed_B.size() == position_B.size(), "position_B: expected ", seed_B.size(),
             " entries, got ", position_B.size());
  for (std::size_t b = 0; b < seed_B.size(); ++b) {
    PYRL_CHECK(position_B[b] >= 0, "position_B: expected >= 0, got ", position_B[b], " in row ", b);
    uniform_B[b] = uniform(seed_B[b], static_cast<std::uint64_t>(position_B[b]));
  }
}

void sample_tokens(const LogitMatrix& logits_BV, std::span<const std::uint64_t> seed_B,
                   std::span<const std::int64_t> position_B, const Truncation& truncation,
                   const SampledTokens& out, int threads) {
  PYRL_CHECK(static_cast<std::int64_t>(seed_B.size()) == logits_BV.rows, "seed_B: expected ",
             logits_BV.rows, " entries, got ", seed_B.size());
  check_truncation(truncation);
  std::vector<double> uniform_B(seed_B.size());
  uniforms(seed_B, position_B, uniform_B);
  const std::size_t blocks = static_cast<std::size_t>((logits_BV.vocabulary + kBlock - 1) / kBlock);
  with_elements(logits_BV, [&](const auto* z) {
    parallel_rows(logits_BV.rows, logits_BV.vocabulary, threads, [&](auto begin, auto end) {
      Workspace space;
      space.blocks.resize(blocks);
      for (std::int64_t b = begin; b < end; ++b) {
        sample_row(z + b * logits_BV.row_stride, logits_BV.vocabulary, truncation,
                   static_cast<std::size_t>(b), uniform_B, space, out);
      }
    });
  });
}

}  // namespace pyrl
