#include "logits/sample/sample_tokens.h"

#include <string>
#include <vector>

#include "base/check.h"
#include "logits/sample/row.h"
#include "base/thread_pool.h"

namespace pyrl {
namespace {

template <typename Element>
void sample_row(const Element* logits, const Element* next, std::int64_t vocabulary,
                const Truncation& truncation, std::size_t b, double uniform,
                RowSpace<Real<Element>>& space, const SampledTokens& out) {
  const bool greedy = truncation.temperature == 0;
  SampleRow<Element> row(logits, next, vocabulary, greedy ? 1.0 : truncation.temperature, space);
  if (!row.valid()) {
    out.token_B[b] = -1;
    return;
  }
  if (greedy) {
    row.keep_most_probable();
  } else {
    if (truncation.min_p > 0) row.keep_min_p(truncation.min_p);
    if (truncation.top_k > 0) row.keep_top_k(truncation.top_k);
    if (truncation.top_p < 1) row.keep_top_p(truncation.top_p);
  }
  const std::int32_t token = row.draw(uniform);
  out.token_B[b] = token;
  out.logprob_B[b] = static_cast<float>(row.logprob(token));
  out.truncated_logprob_B[b] = static_cast<float>(row.truncated_logprob(token));
  out.entropy_B[b] = static_cast<float>(row.entropy());
  out.confidence_B[b] = static_cast<float>(row.confidence());
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
  with_elements(logits_BV, [&](const auto* z) {
    parallel_rows(logits_BV.rows, logits_BV.vocabulary, threads, [&](auto begin, auto end) {
      RowSpace<Real<std::remove_cvref_t<decltype(*z)>>> space;
      for (std::int64_t b = begin; b < end; ++b) {
        const auto* row = z + b * logits_BV.row_stride;
        sample_row(row, b + 1 < end ? row + logits_BV.row_stride : row, logits_BV.vocabulary,
                   truncation, static_cast<std::size_t>(b), uniform_B[static_cast<std::size_t>(b)],
                   space, out);
      }
    });
  });
}

}  // namespace pyrl
