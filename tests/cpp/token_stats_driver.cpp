// The row kernels without Python, for sanitizers and measurements:
//   token_stats_driver random ROUNDS SEED      against float64 sums, at exact bounds of memory
//   token_stats_driver time ROWS VOCABULARY    best of nine runs, one thread, nanoseconds per logit
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/isa.h"
#include "logits/element.h"
#include "logits/stats/token_stats.h"

namespace {

using pyrl::logits::stats::Stat;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "token_stats_driver: %s\n", what.c_str());
  std::exit(1);
}

struct Columns {
  std::vector<std::vector<double>> stat_KT;
  explicit Columns(std::int64_t rows)
      : stat_KT(pyrl::logits::stats::kStats, std::vector<double>(static_cast<std::size_t>(rows))) {}
  double at(Stat stat, std::int64_t t) const {
    return stat_KT[static_cast<std::size_t>(stat)][static_cast<std::size_t>(t)];
  }
};

constexpr pyrl::logits::stats::TokenStatsOptions kPlain{1.0, 0, 5, 0.1, 1.3, 0.8, true};

// ---- random ----

template <typename Element>
pyrl::logits::Dtype dtype();
template <>
pyrl::logits::Dtype dtype<float>() {
  return pyrl::logits::Dtype::float32;
}
template <>
pyrl::logits::Dtype dtype<double>() {
  return pyrl::logits::Dtype::float64;
}
template <>
pyrl::logits::Dtype dtype<pyrl::logits::Float16>() {
  return pyrl::logits::Dtype::float16;
}
template <>
pyrl::logits::Dtype dtype<pyrl::logits::BFloat16>() {
  return pyrl::logits::Dtype::bfloat16;
}

void check_row(const std::vector<double>& z, std::int64_t label, double temperature,
               const Columns& stats, std::int64_t t, const std::string& where) {
  double largest = -kInfinity, sum = 0, entropy = 0;
  for (const double value : z) largest = std::max(largest, value);
  for (const double value : z) sum += std::exp((value - largest) / temperature);
  const double logsumexp = largest / temperature + std::log(sum);
  for (const double value : z) {
    const double logp = (value - largest) / temperature - std::log(sum);
    if (std::isfinite(logp)) entropy -= std::exp(logp) * logp;
  }
  const double logprob = z[static_cast<std::size_t>(label)] / temperature - logsumexp;
  const auto near = [&](Stat stat, double expected) {
    const double got = stats.at(stat, t);
    const bool equal =
        got == expected || std::abs(got - expected) <= 2e-6 + 1e-6 * std::abs(expected);
    require(equal, where + ": statistic " + std::to_string(static_cast<int>(stat)) + " expected " +
                       std::to_string(expected) + ", got " + std::to_string(got));
  };
  near(Stat::logprob, logprob);
  near(Stat::entropy, entropy);
  near(Stat::logsumexp, logsumexp);
}

// Rows in memory of exactly their size, so that a byte read or written outside is found.
template <typename Element>
void random_round(std::mt19937_64& random) {
  const auto below = [&](std::int64_t n) { return static_cast<std::int64_t>(random() % n); };
  const std::int64_t rows = 1 + below(5);
  const std::int64_t vocabulary = 1 + below(below(2) == 0 ? 70 : 40000);
  const std::int64_t stride = vocabulary + below(3);
  const std::size_t size = static_cast<std::size_t>((rows - 1) * stride + vocabulary);
  const auto z = std::make_unique<Element[]>(size);
  const auto dz = std::make_unique<Element[]>(size);
  std::normal_distribution<double> normal(0, 4);
  std::vector<std::vector<double>> wide(static_cast<std::size_t>(rows));
  const auto label = std::make_unique<std::int64_t[]>(static_cast<std::size_t>(rows));
  for (std::int64_t t = 0; t < rows; ++t) {
    label[t] = below(vocabulary);
    for (std::int64_t v = 0; v < vocabulary; ++v) {
      const bool masked = v != label[t] && below(20) == 0;
      const double value = masked ? -kInfinity : normal(random);
      Element* out = z.get() + t * stride + v;
      pyrl::logits::narrow_one(static_cast<pyrl::logits::Real<Element>>(value), out);
      wide[static_cast<std::size_t>(t)].push_back(
          static_cast<double>(pyrl::logits::widen_one(*out)));
    }
  }
  const std::int64_t unusual = below(rows + 3);
  if (unusual < rows)
    label[unusual] = below(2) == 0 ? pyrl::logits::kIgnoredLabel : vocabulary + below(9);
  Columns stats(rows), slopes(rows);
  pyrl::logits::stats::TokenStatsOptions options = kPlain;
  options.temperature = below(2) == 0 ? 1.0 : 0.7;
  pyrl::logits::stats::TokenStatsArgs args{
      {z.get(), dtype<Element>(), rows, vocabulary, stride}, label.get(), options, {}};
  pyrl::logits::stats::TokenStatsGradArgs grad{args.logits_TV, label.get(), options, {}, {},
                                               dz.get(),       stride};
  for (int k = 0; k < pyrl::logits::stats::kStats; ++k) {
    std::vector<double>& column = stats.stat_KT[static_cast<std::size_t>(k)];
    args.stat_T[k] = column.data();
    grad.stat_T[k] = column.data();
    std::fill(slopes.stat_KT[static_cast<std::size_t>(k)].begin(),
              slopes.stat_KT[static_cast<std::size_t>(k)].end(), 0.3);
    if (k <= static_cast<int>(Stat::nucleus_entropy)) {
      grad.grad_T[k] = slopes.stat_KT[static_cast<std::size_t>(k)].data();
    }
  }
  pyrl::logits::stats::token_stats(args, 1);
  pyrl::logits::stats::token_stats_grad(grad, 1);
  for (std::int64_t t = 0; t < rows; ++t) {
    if (t == unusual) continue;
    check_row(wide[static_cast<std::size_t>(t)], label[t], options.temperature, stats, t,
              "vocabulary " + std::to_string(vocabulary));
  }
  // The capped kernels and one visit: for their reads and writes.
  options.softcap = 5;
  args.options.softcap = 5;
  grad.options.softcap = 5;
  pyrl::logits::stats::token_stats(args, 3);
  pyrl::logits::stats::token_stats_grad(grad, 3);
  const auto loss = [](std::int64_t, double logprob, double entropy) {
    return pyrl::logits::stats::RowCoefficients{logprob, entropy, 1};
  };
  pyrl::logits::stats::token_stats_one_go(args, loss, z.get(), stride, 2);
}

// ---- time ----

double seconds_of(const std::function<void()>& run) {
  const auto now = [] {
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double begin = now();
  run();
  return now() - begin;
}

template <typename Element>
void measure(std::int64_t rows, std::int64_t vocabulary, const char* name) {
  const std::int64_t size = rows * vocabulary;
  std::vector<Element> z(static_cast<std::size_t>(size));
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> values(1 << 20);
  for (float& value : values) value = normal(random);
  const auto fill = [&] {
    for (std::int64_t i = 0; i < size; ++i) {
      const std::size_t at = static_cast<std::size_t>(i);
      pyrl::logits::narrow_one(values[(at * 7 + at / values.size()) % values.size()], &z[at]);
    }
  };
  std::vector<std::int64_t> label(static_cast<std::size_t>(rows), 7);
  Columns stats(rows);
  std::vector<double> slope(static_cast<std::size_t>(rows), 0.3);
  pyrl::logits::stats::TokenStatsArgs args{
      {z.data(), dtype<Element>(), rows, vocabulary, vocabulary}, label.data(), kPlain, {}};
  pyrl::logits::stats::TokenStatsGradArgs grad{args.logits_TV, label.data(), kPlain, {}, {},
                                               z.data(),       vocabulary};
  for (int k = 0; k < 3; ++k) {
    args.stat_T[k] = stats.stat_KT[static_cast<std::size_t>(k)].data();
    grad.stat_T[k] = args.stat_T[k];
  }
  grad.grad_T[0] = grad.grad_T[1] = slope.data();
  pyrl::logits::stats::TokenStatsArgs all = args;
  for (int k = 0; k < pyrl::logits::stats::kStats; ++k) {
    all.stat_T[k] = stats.stat_KT[static_cast<std::size_t>(k)].data();
  }
  const auto loss = [](std::int64_t, double logprob, double) {
    return pyrl::logits::stats::RowCoefficients{logprob, 0.01, 0};
  };
  volatile float sink = 0;
  const float* memory = reinterpret_cast<const float*>(z.data());
  float* writable = reinterpret_cast<float*>(z.data());
  const std::int64_t floats = size * static_cast<std::int64_t>(sizeof(Element)) / 4;
  const auto read = [&] {
    float sum[64] = {};
    for (std::int64_t i = 0; i + 64 <= floats; i += 64) {
      for (int k = 0; k < 64; ++k) sum[k] += memory[i + k];
    }
    for (const float part : sum) sink = sink + part;
  };
  const auto update = [&] {
    for (std::int64_t i = 0; i < floats; ++i) writable[i] = -writable[i];
  };
  const std::vector<std::pair<std::string, std::function<void()>>> variants{
      {"read", read},
      {"update", update},
      {"stats", [&] { pyrl::logits::stats::token_stats(args, 1); }},
      {"all stats", [&] { pyrl::logits::stats::token_stats(all, 1); }},
      {"grad in place", [&] { pyrl::logits::stats::token_stats_grad(grad, 1); }},
      {"one go in place",
       [&] { pyrl::logits::stats::token_stats_one_go(args, loss, z.data(), vocabulary, 1); }}};
  std::vector<double> best(variants.size(), 1e9);
  for (int round = 0; round < 9; ++round) {
    for (std::size_t i = 0; i < variants.size(); ++i) {
      fill();
      best[i] = std::min(best[i], seconds_of(variants[i].second));
    }
  }
  std::printf("%s %s [%ld, %ld]:", pyrl::isa_name(pyrl::isa()), name, static_cast<long>(rows),
              static_cast<long>(vocabulary));
  for (std::size_t i = 0; i < variants.size(); ++i) {
    std::printf("  %s %.3f", variants[i].first.c_str(), best[i] / static_cast<double>(size) * 1e9);
  }
  std::printf("\n");
}

}  // namespace

int main(int count, char** argument) try {
  require(count == 4, "expected: random ROUNDS SEED, or time ROWS VOCABULARY");
  const std::int64_t first = std::atoll(argument[2]), second = std::atoll(argument[3]);
  if (std::strcmp(argument[1], "time") == 0) {
    measure<float>(first, second, "float32");
    measure<pyrl::logits::BFloat16>(first, second, "bfloat16");
    measure<pyrl::logits::Float16>(first, second, "float16");
    return 0;
  }
  std::mt19937_64 random(static_cast<std::uint64_t>(second));
  for (std::int64_t round = 0; round < first; ++round) {
    random_round<float>(random);
    random_round<double>(random);
    random_round<pyrl::logits::Float16>(random);
    random_round<pyrl::logits::BFloat16>(random);
  }
  std::printf("%s: %ld rounds\n", pyrl::isa_name(pyrl::isa()), static_cast<long>(first));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "token_stats_driver: %s\n", error.what());
  return 1;
}
