// The gradient of one row of logits, from its statistics and their upstream gradients.
#pragma once

#include "logits/row.h"
#include "logits/stats/token_stats.h"

namespace pyrl::logits::stats {

// What one row's gradient is made of.
struct RowUpstream {
  double logprob, entropy, logsumexp, self_certainty, nucleus_entropy;

  // Else the row has no part in what is differentiated, whatever it holds.
  bool asks() const {
    return logprob != 0 || entropy != 0 || logsumexp != 0 || self_certainty != 0 ||
           nucleus_entropy != 0;
  }
};
struct RowForward {
  double entropy, logsumexp, nucleus_entropy, nucleus_threshold, nucleus_log_mass;
};

template <typename Row>
class Gradient {
  using Element = typename Row::Element;

 public:
  Gradient(const Row& row, std::int64_t label, const TokenStatsOptions& options,
           const RowUpstream& upstream, const RowForward& forward, bool masked = true)
      : row_(row), label_(label), temperature_(options.temperature), g_(upstream), f_(forward) {
    nucleus_ = g_.nucleus_entropy != 0 && f_.nucleus_log_mass > kMinusInfinity;
    const auto& kernels = row_kernels<typename Row::Block>();
    const double scale = kernels.representable(exponent_scale(temperature_));
    const double exact = f_.logsumexp * temperature_ * scale;
    const double shift = kernels.representable(exact);
    const double all = g_.logsumexp + g_.self_certainty - g_.logprob - g_.entropy * f_.entropy;
    const double inside = nucleus_ ? g_.nucleus_entropy / std::exp(f_.nucleus_log_mass) : 0;
    const double inside_all = inside * (f_.nucleus_log_mass - f_.nucleus_entropy);
    // p = 2^(t + rest): the rest of the rounded shift goes into the coefficients.
    const double rest = shift - exact, factor = std::exp2(rest) / temperature_;
    const auto constant = [&](double at_zero, double slope) {
      return factor * (at_zero + slope * std::numbers::ln2 * rest);
    };
    kernel_row_.masked = masked;
    kernel_row_.exponent = {scale, shift};
    kernel_row_.constant = constant(all, -g_.entropy);
    kernel_row_.slope = -g_.entropy * std::numbers::ln2 * factor;
    kernel_row_.offset = -g_.self_certainty / static_cast<double>(row.vocabulary) / temperature_;
    kernel_row_.threshold = nucleus_ ? f_.nucleus_threshold : kNaN;
    kernel_row_.inside_constant = constant(all + inside_all, -g_.entropy - inside);
    kernel_row_.inside_slope = -(g_.entropy + inside) * std::numbers::ln2 * factor;
  }

  // Columns [begin, end).
  void write(std::int64_t begin, std::int64_t end, Element* dz) const {
    if (label_ == kIgnoredLabel || f_.logsumexp == kMinusInfinity || !g_.asks()) {
      return fill(begin, end, 0, dz);
    }
    if (label_ < 0 || label_ >= row_.vocabulary || std::isnan(f_.logsumexp)) {
      return fill(begin, end, kNaN, dz);
    }
    const bool here = begin <= label_ && label_ < end;
    const double dz_label = here ? label_gradient() : 0;  // before dz overwrites z
    for (std::int64_t at = begin; at < end; at += kBlock) {
      row_.gradient(at, static_cast<int>(std::min<std::int64_t>(kBlock, end - at)), kernel_row_,
                    dz);
    }
    if (here) narrow_one(static_cast<Real<Element>>(dz_label), dz + label_);
  }

 private:
  void fill(std::int64_t begin, std::int64_t end, double value, Element* dz) const {
    Element element;
    narrow_one(static_cast<Real<Element>>(value), &element);
    std::fill(dz + begin, dz + end, element);
  }

  // On its own: 1 - p cancels when p is near 1, expm1 does not.
  double label_gradient() const {
    const double v = row_.logit(label_), logprob = v / temperature_ - f_.logsumexp;
    const double p = std::exp(logprob);
    double du = (g_.logsumexp + g_.self_certainty) * p - g_.logprob * std::expm1(logprob) -
                g_.self_certainty / static_cast<double>(row_.vocabulary);
    if (p > 0) du -= g_.entropy * p * (logprob + f_.entropy);
    if (nucleus_ && p > 0 && v >= f_.nucleus_threshold) {
      const double log_q = logprob - f_.nucleus_log_mass;
      du -= g_.nucleus_entropy * std::exp(log_q) * (log_q + f_.nucleus_entropy);
    }
    return du * row_.slope(v) / temperature_;
  }

  Row row_;
  std::int64_t label_;
  double temperature_;
  RowUpstream g_;
  RowForward f_;
  GradientRow kernel_row_;
  bool nucleus_;
};

}  // namespace pyrl::logits::stats
