#include "token_stats.h"

#include "check.h"
#include "logit_row.h"
#include "parallel_rows.h"

namespace pyrl {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

void check(const LogitMatrix& logits_TV, const std::int64_t* label_T) {
  PYRL_CHECK(logits_TV.vocabulary > 0, "logits_TV: expected at least one column, got 0");
  for (std::int64_t t = 0; t < logits_TV.rows; ++t) {
    PYRL_CHECK(
        label_T[t] == kIgnoredLabel || (label_T[t] >= 0 && label_T[t] < logits_TV.vocabulary),
        "label_T: expected -100 (ignored) or 0 <= label < ", logits_TV.vocabulary, ", got ",
        label_T[t], " at ", t);
  }
}

template <typename Element>
void stats_row(const Element* z, std::int64_t t, double scale, const TokenStatsArgs& args) {
  const std::int64_t label = args.label_T[t];
  const auto write = [&](double logprob, double entropy, double logsumexp, double confidence) {
    args.logprob_T[t] = logprob;
    args.entropy_T[t] = entropy;
    args.logsumexp_T[t] = logsumexp;
    args.confidence_T[t] = confidence;
  };
  if (label == kIgnoredLabel) return write(0, 0, 0, 0);
  const auto summary = summarize(z, args.logits_TV.vocabulary, scale);
  if (!summary.valid) return write(kNaN, kNaN, kNaN, kNaN);
  const RowSums& sums = summary.sums;
  write(sums.logprob(static_cast<double>(widen_one(z[label])), args.temperature), sums.entropy(),
        sums.logsumexp(args.temperature), summary.confidence(scale));
}

// The row's three upstream gradients as the coefficients of p_j (constant + slope log2 p_j).
template <typename R>
GradientRow<R> gradient_row(const TokenStatsGradArgs& args, std::int64_t t, double scale) {
  const double shift = args.logsumexp_T[t] * args.temperature;
  const double constant = args.grad_logsumexp_T[t] - args.grad_logprob_T[t] -
                          args.grad_entropy_T[t] * args.entropy_T[t];
  GradientRow<R> row;
  row.shift = static_cast<R>(shift);
  row.rest = static_cast<R>(shift - static_cast<double>(row.shift));
  row.scale = static_cast<R>(scale);
  row.constant = static_cast<R>(constant / args.temperature);
  row.slope = static_cast<R>(-args.grad_entropy_T[t] * std::numbers::ln2 / args.temperature);
  return row;
}

// The label's element on its own: 1 - p cancels when p is near 1, expm1 does not.
double label_gradient(const TokenStatsGradArgs& args, std::int64_t t, double z) {
  const double logprob = z / args.temperature - args.logsumexp_T[t];
  const double p = std::exp(logprob);
  const double spread = p == 0 ? 0 : p * (logprob + args.entropy_T[t]);
  return (args.grad_logsumexp_T[t] * p - args.grad_logprob_T[t] * std::expm1(logprob) -
          args.grad_entropy_T[t] * spread) /
         args.temperature;
}

template <typename Element>
void store_one(double value, Element* out) {
  const Real<Element> rounded = static_cast<Real<Element>>(value);
  if constexpr (std::is_same_v<Element, Real<Element>>) {
    *out = rounded;
  } else {
    narrow(&rounded, 1, out);
  }
}

template <typename Element>
void fill(double value, std::int64_t n, Element* out) {
  Element element;
  store_one(value, &element);
  std::fill_n(out, n, element);
}

template <typename Element>
void grad_row(const Element* z, std::int64_t t, double scale, const TokenStatsGradArgs& args,
              Element* dz) {
  using R = Real<Element>;
  const std::int64_t vocabulary = args.logits_TV.vocabulary;
  const std::int64_t label = args.label_T[t];
  const double logsumexp = args.logsumexp_T[t];
  if (label == kIgnoredLabel || logsumexp == kMinusInfinity) return fill(0, vocabulary, dz);
  if (std::isnan(logsumexp)) return fill(kNaN, vocabulary, dz);
  const double label_dz =
      label_gradient(args, t, static_cast<double>(widen_one(z[label])));  // before dz overwrites z
  const GradientRow<R> row = gradient_row<R>(args, t, scale);
  alignas(64) R buffer[kBlock];
  for (std::int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int n = static_cast<int>(std::min<std::int64_t>(kBlock, vocabulary - begin));
    R* out = wide(dz + begin, buffer);
    block_gradient(widen(z + begin, n, buffer), out, n, row);
    narrow(out, n, dz + begin);
  }
  store_one(label_dz, dz + label);
}

}  // namespace

void token_stats(const TokenStatsArgs& args, int threads) {
  const LogitMatrix& logits_TV = args.logits_TV;
  check(logits_TV, args.label_T);
  const double scale = exponent_scale(args.temperature);
  with_elements(logits_TV, [&](const auto* z) {
    parallel_rows(logits_TV.rows, logits_TV.vocabulary, threads, [&](auto begin, auto end) {
      for (std::int64_t t = begin; t < end; ++t) {
        stats_row(z + t * logits_TV.row_stride, t, scale, args);
      }
    });
  });
}

void token_stats_grad(const TokenStatsGradArgs& args, int threads) {
  const LogitMatrix& logits_TV = args.logits_TV;
  check(logits_TV, args.label_T);
  const double scale = exponent_scale(args.temperature);
  with_elements(logits_TV, [&]<typename Element>(const Element* z) {
    Element* dz = static_cast<Element*>(args.grad_TV);
    parallel_rows(logits_TV.rows, logits_TV.vocabulary, threads, [&](auto begin, auto end) {
      for (std::int64_t t = begin; t < end; ++t) {
        grad_row(z + t * logits_TV.row_stride, t, scale, args, dz + t * args.grad_row_stride);
      }
    });
  });
}

}  // namespace pyrl
