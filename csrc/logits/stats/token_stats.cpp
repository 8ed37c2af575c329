#include "logits/stats/token_stats.h"

#include <vector>

#include "base/check.h"
#include "base/thread_pool.h"
#include "logits/row.h"
#include "logits/stats/gradient.h"
#include "logits/stats/statistics.h"

namespace pyrl::logits::stats {
namespace {

void check(const LogitMatrix& logits_TV, const TokenStatsOptions& options) {
  PYRL_CHECK(logits_TV.vocabulary > 0, "logits_TV: expected at least one column, got 0");
  static_cast<void>(exponent_scale(options.temperature));
  PYRL_CHECK(options.softcap >= 0 && std::isfinite(options.softcap),
             "softcap: expected a finite number >= 0 (0: none), got ", options.softcap);
}

void check(const TokenStatsArgs& args) {
  const TokenStatsOptions& options = args.options;
  const auto wants = [&](Stat stat) { return args.stat_T[index(stat)] != nullptr; };
  check(args.logits_TV, options);
  PYRL_CHECK(!wants(Stat::confidence) || (options.top_k >= 1 && options.top_k <= kMostTop),
             "top_k: expected 1 to ", kMostTop, ", got ", options.top_k);
  PYRL_CHECK(!wants(Stat::kept_mass) || (options.kept_share > 0 && options.kept_share <= 1),
             "kept_share: expected 0 < kept_share <= 1, got ", options.kept_share);
  if (wants(Stat::second_logprob)) {
    PYRL_CHECK(options.second_temperature > 0 && std::isfinite(options.second_temperature),
               "second_temperature: expected a finite number > 0, got ",
               options.second_temperature);
  }
  if (wants(Stat::nucleus_entropy) || wants(Stat::nucleus_threshold) ||
      wants(Stat::nucleus_log_mass)) {
    PYRL_CHECK(options.nucleus > 0 && options.nucleus <= 1,
               "nucleus: expected 0 < nucleus <= 1, got ", options.nucleus);
  }
}

// Calls visit(row_of), where row_of(t) is a PlainRow or a CappedRow.
template <typename Visit>
void with_rows(const LogitMatrix& logits_TV, double softcap, Visit&& visit) {
  with_elements(logits_TV, [&]<typename Element>(const Element* z) {
    const std::int64_t vocabulary = logits_TV.vocabulary, stride = logits_TV.row_stride;
    if (softcap == 0) {
      visit([=](std::int64_t t) { return PlainRow<Element>{z + t * stride, vocabulary}; });
    } else {
      visit(
          [=](std::int64_t t) { return CappedRow<Element>{z + t * stride, vocabulary, softcap}; });
    }
  });
}

// Few long rows: their parts are shared by the threads.
bool share_parts(const LogitMatrix& logits_TV, int threads) {
  return logits_TV.rows < 4 * static_cast<std::int64_t>(threads) && threads > 1 &&
         logits_TV.vocabulary > kPart;
}

template <typename RowOf>
void stats_of_parts(const Statistics<RowOf>& statistics, const LogitMatrix& logits_TV,
                    int threads) {
  const std::int64_t parts = parts_of(logits_TV.vocabulary),
                     blocks = blocks_of(logits_TV.vocabulary);
  std::vector<PartSums> sums(static_cast<std::size_t>(logits_TV.rows * parts));
  std::vector<double> maxima(
      statistics.selects() ? static_cast<std::size_t>(logits_TV.rows * blocks) : 0);
  const auto maxima_of = [&](std::int64_t t) {
    return statistics.selects() ? maxima.data() + t * blocks : nullptr;
  };
  parallel_rows(logits_TV.rows * parts, kPart, threads, [&](auto begin, auto end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t t = i / parts;
      if (statistics.ignored(t) || statistics.outside(t)) continue;
      sums[static_cast<std::size_t>(i)] = statistics.part(t, i % parts, maxima_of(t));
    }
  });
  parallel_rows(logits_TV.rows, logits_TV.vocabulary, threads, [&](auto begin, auto end) {
    typename Statistics<RowOf>::ThreadSpace space;
    for (std::int64_t t = begin; t < end; ++t) {
      PartSums total;
      for (std::int64_t i = t * parts; i < (t + 1) * parts; ++i) {
        statistics.merge(total, sums[static_cast<std::size_t>(i)]);
      }
      statistics.finish(t, total, maxima_of(t), space);
    }
  });
}

double at(const double* const* column_of_stat, Stat stat, std::int64_t t) {
  const double* column_T = column_of_stat[index(stat)];
  return column_T == nullptr ? 0 : column_T[t];
}

template <typename Row>
Gradient<Row> gradient_of(const Row& row, std::int64_t t, const TokenStatsGradArgs& args) {
  const auto g = [&](Stat stat) { return at(args.grad_T, stat, t); };
  const auto f = [&](Stat stat) { return at(args.stat_T, stat, t); };
  return {row,
          args.label_T[t],
          args.options,
          {g(Stat::logprob), g(Stat::entropy), g(Stat::logsumexp), g(Stat::self_certainty),
           g(Stat::nucleus_entropy)},
          {f(Stat::entropy), f(Stat::logsumexp), f(Stat::nucleus_entropy),
           f(Stat::nucleus_threshold), f(Stat::nucleus_log_mass)}};
}

}  // namespace

void token_stats(const TokenStatsArgs& args, int threads) {
  const LogitMatrix& logits_TV = args.logits_TV;
  check(args);
  with_rows(logits_TV, args.options.softcap, [&](auto row_of) {
    const Statistics statistics(row_of, args);
    if (share_parts(logits_TV, threads)) return stats_of_parts(statistics, logits_TV, threads);
    parallel_rows(logits_TV.rows, logits_TV.vocabulary, threads, [&](auto begin, auto end) {
      typename decltype(statistics)::ThreadSpace space;
      for (std::int64_t t = begin; t < end; ++t) statistics.row(t, space);
    });
  });
}

void token_stats_grad(const TokenStatsGradArgs& args, int threads) {
  const LogitMatrix& logits_TV = args.logits_TV;
  check(logits_TV, args.options);
  with_rows(logits_TV, args.options.softcap, [&](auto row_of) {
    using Element = typename decltype(row_of(0))::Element;
    const std::int64_t vocabulary = logits_TV.vocabulary;
    const std::int64_t width = share_parts(logits_TV, threads) ? kPart : vocabulary;
    const std::int64_t pieces = (vocabulary + width - 1) / width;
    parallel_rows(logits_TV.rows * pieces, width, threads, [&](auto begin, auto end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t t = i / pieces, first = i % pieces * width;
        gradient_of(row_of(t), t, args)
            .write(first, std::min(first + width, vocabulary),
                   static_cast<Element*>(args.grad_TV) + t * args.grad_row_stride);
      }
    });
  });
}

void token_stats_one_go(const TokenStatsArgs& args, const RowLoss& loss, void* grad_TV,
                        std::int64_t grad_row_stride, int threads) {
  const LogitMatrix& logits_TV = args.logits_TV;
  check(args);
  if (logits_TV.rows == 0) return;  // empty columns have no address
  const auto stat = [&](Stat asked, std::int64_t t) { return args.stat_T[index(asked)][t]; };
  for (const Stat needed : {Stat::logprob, Stat::entropy, Stat::logsumexp}) {
    PYRL_CHECK(args.stat_T[index(needed)] != nullptr,
               "stat_T: expected logprob, entropy and logsumexp, got a null pointer");
  }
  with_rows(logits_TV, args.options.softcap, [&](auto row_of) {
    using Element = typename decltype(row_of(0))::Element;
    const Statistics statistics(row_of, args);
    const auto coefficients = [&](std::int64_t t) -> RowCoefficients {
      if (statistics.ignored(t)) return {0, 0, 0};
      return loss(t, stat(Stat::logprob, t), stat(Stat::entropy, t));
    };
    const auto write = [&](std::int64_t t, const RowCoefficients& g, std::int64_t begin,
                           std::int64_t end, bool masked) {
      Gradient(row_of(t), args.label_T[t], args.options, {g.logprob, g.entropy, g.logsumexp, 0, 0},
               {stat(Stat::entropy, t), stat(Stat::logsumexp, t), 0, 0, 0}, masked)
          .write(begin, end, static_cast<Element*>(grad_TV) + t * grad_row_stride);
    };
    const std::int64_t rows = logits_TV.rows, vocabulary = logits_TV.vocabulary;
    if (!share_parts(logits_TV, threads)) {
      parallel_rows(rows, vocabulary, threads, [&](auto begin, auto end) {
        typename decltype(statistics)::ThreadSpace space;
        for (std::int64_t t = begin; t < end; ++t) {
          const bool masked = statistics.row(t, space);
          write(t, coefficients(t), 0, vocabulary, masked);
        }
      });
      return;
    }
    stats_of_parts(statistics, logits_TV, threads);
    std::vector<RowCoefficients> g_T;
    for (std::int64_t t = 0; t < rows; ++t) g_T.push_back(coefficients(t));
    const std::int64_t parts = parts_of(vocabulary);
    parallel_rows(rows * parts, kPart, threads, [&](auto begin, auto end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t t = i / parts, first = i % parts * kPart;
        write(t, g_T[static_cast<std::size_t>(t)], first, std::min(first + kPart, vocabulary),
              true);
      }
    });
  });
}

}  // namespace pyrl::logits::stats
