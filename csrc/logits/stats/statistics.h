// The statistics of rows of logits: sums of their parts, then what is asked for.
#pragma once

#include <utility>
#include <vector>

#include "logits/row.h"
#include "logits/stats/nucleus.h"
#include "logits/stats/token_stats.h"

namespace pyrl::logits::stats {

constexpr std::size_t index(Stat stat) { return static_cast<std::size_t>(stat); }

// Work space of one thread.
template <typename R>
struct Space {
  std::vector<double> maximum_of_block;
  std::vector<R> candidates;
};

template <typename RowOf>
class Statistics {
  using Row = decltype(std::declval<RowOf>()(0));
  using R = Real<typename Row::Element>;

 public:
  using ThreadSpace = Space<R>;

  Statistics(RowOf row_of, const TokenStatsArgs& args)
      : row_of_(row_of),
        args_(args),
        scale_(row_kernels<typename Row::Block>().representable(
            exponent_scale(args.options.temperature))),
        sums_{exponent_scale(args.options.temperature),
              wants(Stat::self_certainty) || wants(Stat::sum_p2) || wants(Stat::sum_p2_logp) ||
                  wants(Stat::second_logprob),
              wants(Stat::second_logprob)
                  ? args.options.temperature / args.options.second_temperature
                  : 1},
        selects_(wants(Stat::nucleus_entropy) || wants(Stat::nucleus_threshold) ||
                 wants(Stat::nucleus_log_mass) || wants(Stat::confidence) ||
                 wants(Stat::kept_mass) || wants(Stat::max_probability)) {}

  bool selects() const { return selects_; }
  bool ignored(std::int64_t t) const { return args_.label_T[t] == kIgnoredLabel; }
  bool outside(std::int64_t t) const {
    return args_.label_T[t] < 0 || args_.label_T[t] >= args_.logits_TV.vocabulary;
  }

  PartSums part(std::int64_t t, std::int64_t part, double* maximum_of_block) const {
    const std::int64_t begin = part * kPart;
    const std::int64_t end = std::min(begin + kPart, args_.logits_TV.vocabulary);
    return sum_part(row_of_(t), begin, end, sums_, maximum_of_block);
  }

  // Returns whether the row may have masked tokens.
  bool row(std::int64_t t, ThreadSpace& space) const {
    PartSums total;
    if (selects_) {
      space.maximum_of_block.resize(
          static_cast<std::size_t>(blocks_of(args_.logits_TV.vocabulary)));
    }
    double* maxima = selects_ ? space.maximum_of_block.data() : nullptr;
    if (!ignored(t) && !outside(t)) {
      for (std::int64_t p = 0; total.valid && p < parts_of(args_.logits_TV.vocabulary); ++p) {
        merge(total, part(t, p, maxima));
      }
    }
    finish(t, total, maxima, space);
    return total.masked;
  }

  void merge(PartSums& total, const PartSums& part) const { total.merge(part, sums_.second_ratio); }

  // Writes the statistics of row t.
  void finish(std::int64_t t, const PartSums& total, const double* maxima,
              ThreadSpace& space) const {
    if (ignored(t)) return write_all(t, 0);
    if (outside(t) || !total.valid) return write_all(t, kNaN);
    if (total.empty()) {
      write_all(t, 0);
      write(Stat::logprob, t, kMinusInfinity);
      write(Stat::logsumexp, t, kMinusInfinity);
      return;
    }
    const Row row = row_of_(t);
    const double temperature = args_.options.temperature;
    const double near = row.logit(args_.label_T[t]) - total.shift / scale_;
    write(Stat::logprob, t, at_most_0(near / temperature - std::log(total.sum)));
    write(Stat::entropy, t, total.entropy());
    write(Stat::logsumexp, t, total.shift / scale_ / temperature + std::log(total.sum));
    if (sums_.extras) finish_extras(t, near, total);
    if (selects_) finish_selections(t, row, total, maxima, space);
  }

 private:
  bool wants(Stat stat) const { return args_.stat_T[index(stat)] != nullptr; }

  void write(Stat stat, std::int64_t t, double value) const {
    if (wants(stat)) args_.stat_T[index(stat)][t] = value;
  }

  void write_all(std::int64_t t, double value) const {
    for (int stat = 0; stat < kStats; ++stat) write(static_cast<Stat>(stat), t, value);
  }

  void finish_extras(std::int64_t t, double near, const PartSums& total) const {
    const double log2_sum = std::log2(total.sum);
    const double vocabulary = static_cast<double>(args_.logits_TV.vocabulary);
    const double certainty = (log2_sum - total.exponent_sum / vocabulary) * std::numbers::ln2;
    write(Stat::self_certainty, t, at_least_0(certainty - std::log(vocabulary)));
    write(Stat::sum_p2, t, total.sum_p2 / total.sum / total.sum);
    write(Stat::sum_p2_logp, t,
          (total.moment_p2 - total.sum_p2 * log2_sum) * std::numbers::ln2 / total.sum / total.sum);
    write(Stat::second_logprob, t,
          at_most_0(near / args_.options.second_temperature - std::log(total.second)));
  }

  void finish_selections(std::int64_t t, const Row& row, const PartSums& total,
                         const double* maxima, ThreadSpace& space) const {
    const TokenStatsOptions& options = args_.options;
    const double largest = std::exp2(total.maximum * scale_ - total.shift);
    write(Stat::max_probability, t, std::min(1.0, largest / total.sum));
    if (wants(Stat::confidence)) write(Stat::confidence, t, confidence(row, total, maxima));
    if (wants(Stat::kept_mass)) {
      const double floor = total.maximum + std::log2(options.kept_share) / scale_;
      double mass = 0;
      each_block(row, 0, row.vocabulary, maxima, floor, [&](const auto* z, int n) {
        mass += kernels().sums_above(z, n, {scale_, total.shift}, floor).sum;
      });
      write(Stat::kept_mass, t, std::min(1.0, mass / total.sum));
    }
    if (!wants(Stat::nucleus_entropy) && !wants(Stat::nucleus_threshold) &&
        !wants(Stat::nucleus_log_mass)) {
      return;
    }
    const Nucleus nucleus = find_nucleus(row, total, maxima, scale_, options.nucleus,
                                         options.nucleus_keeps_crossing, space.candidates);
    write(Stat::nucleus_entropy, t, nucleus.entropy);
    write(Stat::nucleus_threshold, t, nucleus.threshold);
    write(Stat::nucleus_log_mass, t, nucleus.log_mass);
  }

  double confidence(const Row& row, const PartSums& total, const double* maxima) const {
    const int count = args_.options.top_k;
    R top[kMostTop];
    std::fill_n(top, kMostTop, -std::numeric_limits<R>::infinity());
    double least = kMinusInfinity;
    each_block(row, 0, row.vocabulary, maxima, least, [&](const auto* z, int n) {
      kernels().top(z, n, top, count);
      least = static_cast<double>(top[count - 1]);
    });
    double mass = 0;
    for (int k = 0; k < count; ++k) {
      mass += std::exp2(static_cast<double>(top[k]) * scale_ - total.shift);
    }
    return std::min(1.0, mass / total.sum);
  }

  static const RowKernels<typename Row::Block>& kernels() {
    return row_kernels<typename Row::Block>();
  }

  RowOf row_of_;
  const TokenStatsArgs& args_;
  double scale_;
  SumOptions sums_;
  bool selects_;
};

}  // namespace pyrl::logits::stats
