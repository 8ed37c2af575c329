#include "logits/sample/sample_tokens.h"

#include <limits>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "base/thread_pool.h"
#include "logits/sample/row.h"

namespace pyrl::logits::sample {
namespace {

template <typename Element>
void sample_row(const Element* logits, const Element* next, std::int64_t vocabulary,
                const Truncation& truncation, std::span<const std::int32_t> excluded, std::size_t b,
                double uniform, RowSpace<Real<Element>>& space, const SampledTokens& out) {
  const bool greedy = truncation.temperature == 0;
  SampleRow<Element> row(logits, next, vocabulary, greedy ? 1.0 : truncation.temperature, excluded,
                         space);
  std::int32_t token = -1;
  if (row.valid() && greedy) {
    token = row.most_probable();
  } else if (row.valid()) {
    if (truncation.min_p > 0) row.keep_min_p(truncation.min_p);
    if (truncation.top_k > 0) row.keep_top_k(truncation.top_k);
    if (truncation.top_p < 1) row.keep_top_p(truncation.top_p);
    if (truncation.top_h < 1) row.keep_top_h(truncation.top_h);
    token = row.draw(uniform);
  }
  out.token_B[b] = token;
  if (token < 0) return;
  out.logprob_B[b] = static_cast<float>(row.logprob(token));
  out.truncated_logprob_B[b] = greedy ? 0 : static_cast<float>(row.truncated_logprob(token));
  out.rest_logprob_B[b] =
      greedy ? -std::numeric_limits<float>::infinity() : static_cast<float>(row.rest_logprob());
  out.entropy_B[b] = static_cast<float>(row.entropy());
  out.confidence_B[b] = static_cast<float>(row.confidence());
}

std::span<const std::int32_t> tokens_of(const Excluded& excluded, std::int64_t b) {
  if (excluded.offset_B1 == nullptr) return {};
  return {excluded.token_E + excluded.offset_B1[b], excluded.token_E + excluded.offset_B1[b + 1]};
}

void check_truncation(const Truncation& truncation) {
  if (truncation.temperature != 0) static_cast<void>(exponent_scale(truncation.temperature));
  PYRL_CHECK(truncation.top_k >= 0, "top_k: expected >= 0, got ", truncation.top_k);
  PYRL_CHECK(truncation.top_p > 0 && truncation.top_p <= 1, "top_p: expected 0 < top_p <= 1, got ",
             truncation.top_p);
  PYRL_CHECK(truncation.min_p >= 0 && truncation.min_p < 1, "min_p: expected 0 <= min_p < 1, got ",
             truncation.min_p);
  PYRL_CHECK(truncation.top_h > 0 && truncation.top_h <= 1, "top_h: expected 0 < top_h <= 1, got ",
             truncation.top_h);
}

}  // namespace

void sample_tokens(const LogitMatrix& logits_BV, std::span<const std::uint64_t> seed_B,
                   std::span<const std::int64_t> position_B, const Truncation& truncation,
                   const Excluded& excluded, const SampledTokens& out, int threads) {
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
                   truncation, tokens_of(excluded, b), static_cast<std::size_t>(b),
                   uniform_B[static_cast<std::size_t>(b)], space, out);
      }
    });
  });
}

}  // namespace pyrl::logits::sample
