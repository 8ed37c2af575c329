// One row of logits in two sweeps: the largest logit, then the sums of the weights 2^t for
// t = (z - largest) log2(e) / temperature. The row is cut into parts that fit the L1 cache.
//
// Min-p, top-k, top-p and top-h need no sort: the smallest kept logit is found by bisection. Each
// step asks how many tokens, how much mass or which entropy lies at or above a value, and moves the
// bracket to logits that occur; the tokens of a narrow bracket are copied out, and only they are
// asked from then on.
//
// Excluded tokens are summed beside the others, never subtracted from them: what a token with
// nearly all of the mass leaves is as exact as any other sum.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <span>
#include <type_traits>
#include <vector>

#include "logits/row.h"
#include "logits/sample/kernels.h"

namespace pyrl::logits::sample {

template <typename R>
struct RowPart {
  std::int64_t begin;
  int n;
  R maximum;
  double mass = 0;        // of its tokens that can be drawn: kept by truncation and not excluded
  std::int64_t ties = 0;  // kept tokens at the floor of the truncation
  const R* z = nullptr;   // null: its tokens have not been weighed
  R* weight = nullptr;
  std::span<const std::int32_t> excluded{};  // of its tokens
};

// Work space of one thread.
template <typename R>
struct RowSpace {
  std::vector<RowPart<R>> parts;
  std::vector<R> maxima;                   // of the parts
  std::vector<R> z, weight;                // of a whole row; z only where it is widened
  std::vector<R> inside_z, inside_weight;  // of the tokens in a bracket
  std::vector<std::int32_t> excluded;      // ascending, each once
};

template <typename Element>
class SampleRow {
 public:
  using R = Real<Element>;

  // `next`: the row that will be read after this one, or the same. `excluded`: tokens in any order.
  SampleRow(const Element* row, const Element* next, std::int64_t vocabulary, double temperature,
            std::span<const std::int32_t> excluded, RowSpace<R>& space)
      : row_(row),
        vocabulary_(vocabulary),
        temperature_(temperature),
        scale_(exponent_scale(temperature)),
        space_(space) {
    R buffer[kSampleBlock];
    space.parts.clear();
    space.maxima.clear();
    for (std::int64_t begin = 0; begin < vocabulary; begin += kSampleBlock) {
      const int n = static_cast<int>(std::min<std::int64_t>(kSampleBlock, vocabulary - begin));
      const R maximum = kernels_.maximum(widen(row + begin, n, buffer), n);
      space.parts.push_back({begin, n, maximum});
      space.maxima.push_back(maximum);
      maximum_ = std::max(maximum_, maximum);
    }
    if (!std::isfinite(maximum_)) return;
    floor_ = at_depth(-kLowestExponent);
    exclude(excluded);
    for (RowPart<R>& part : space.parts) {
      const R* z = remaining(part, buffer);
      const char* ahead = reinterpret_cast<const char*>(next + part.begin);
      const SampleSums sums = kernels_.sums(z, part.n, maximum_, static_cast<R>(scale_), ahead);
      part.mass = sums.sum;
      sum_ += sums.sum;
      moment_ += sums.moment;
    }
    add_excluded();
    kept_mass_ = sum_;
  }

  // false: the row has NaN, +inf or nothing but -inf.
  bool valid() const { return std::isfinite(maximum_) && !std::isnan(moment_); }

  // nats
  double entropy() const { return bits(sum_, moment_) * std::numbers::ln2; }

  // nats; of the distribution that truncation leaves, where there is one
  double logprob(std::int32_t token) const { return log_weight(token) - std::log(sum_); }
  double truncated_logprob(std::int32_t token) const {
    return log_weight(token) - std::log(kept_mass_);
  }
  // of all tokens that could have been drawn in place of the one that was
  double rest_logprob() const { return std::log(rest_mass_) - std::log(kept_mass_); }

  // Mass of the most probable tokens. A part below the fifth largest maximum has none of them.
  double confidence() const {
    R least[kSampleTop], top[kSampleTop], weight[kSampleTop], buffer[kSampleBlock];
    std::fill_n(least, kSampleTop, -std::numeric_limits<R>::infinity());
    std::copy_n(least, kSampleTop, top);
    kernels_.top(space_.maxima.data(), static_cast<int>(space_.maxima.size()), least);
    for (const RowPart<R>& part : space_.parts) {
      if (part.maximum < least[kSampleTop - 1] || part.maximum <= top[kSampleTop - 1]) continue;
      kernels_.top(widen(row_ + part.begin, part.n, buffer), part.n, top);
    }
    weigh(top, weight, kSampleTop);
    double mass = 0;
    for (const R one : weight) mass += static_cast<double>(one);
    return std::min(1.0, mass / sum_);
  }

  // Truncations; each is of what the ones before it have left, excluded tokens included.
  void keep_min_p(double min_p) { keep(std::max(floor_, at_depth(-std::log2(min_p))), kAll); }

  void keep_top_k(std::int64_t top_k) {
    if (top_k >= vocabulary_) return;
    const auto count = [](const Above<R>& above) { return above.count; };
    const Crossing crossing = find_crossing(count, top_k);
    if (crossing.found) keep(crossing.floor, top_k - crossing.over.count);
  }

  // The token that lifts the mass to top_p stays.
  void keep_top_p(double top_p) {
    const auto mass = [](const Above<R>& above) { return above.mass; };
    const double target = top_p * kept_mass_;
    const Crossing crossing = find_crossing(mass, target);
    if (!crossing.found) return;
    const double lacking = (target - crossing.over.mass) / weight_of(crossing.floor);
    const auto ties = static_cast<std::int64_t>(std::max(1.0, std::ceil(lacking)));
    keep(crossing.floor, ties);
  }

  // As many tokens as have, renormalised, at most this share of the entropy of the whole row. It
  // rises with each token that is no more probable than the others, so there is one crossing.
  void keep_top_h(double top_h) {
    const double bound = top_h * bits(sum_, moment_);
    const auto exceeds = [&](const Above<R>& above) {
      return bits(above.mass, above.moment) > bound;
    };
    sums_moments_ = true;
    const Crossing crossing = find_crossing(exceeds, true);
    sums_moments_ = false;
    if (!crossing.found) return;
    const double tie = weight_of(crossing.floor), t = log2_weight(crossing.floor);
    // One token has no entropy.
    std::int64_t ties = crossing.over.count == 0 ? 1 : 0, most = vocabulary_;
    while (ties < most) {
      const std::int64_t more = ties + (most - ties + 1) / 2;
      const double mass = static_cast<double>(more) * tie;
      const bool over = bits(crossing.over.mass + mass, crossing.over.moment + mass * t) > bound;
      (over ? most : ties) = over ? more - 1 : more;
    }
    keep(crossing.floor, ties);
  }

  // Of the tokens that are not excluded the most probable one, with the lowest id; -1: there is
  // none.
  std::int32_t most_probable() const {
    R buffer[kSampleBlock], largest = -std::numeric_limits<R>::infinity();
    std::int32_t token = -1;
    for (const RowPart<R>& part : space_.parts) {
      if (part.maximum <= largest) continue;
      const R* z = remaining(part, buffer);
      const R maximum = part.excluded.empty() ? part.maximum : kernels_.maximum(z, part.n);
      if (maximum <= largest) continue;
      largest = maximum;
      token = static_cast<std::int32_t>(part.begin + (std::find(z, z + part.n, maximum) - z));
    }
    return token;
  }

  // Of the kept tokens that are not excluded, in vocabulary order, the one at which the cumulative
  // mass exceeds `uniform` of theirs; -1: there is none.
  std::int32_t draw(double uniform) {
    if (truncated_) drop_excluded();
    double mass = 0;
    for (const RowPart<R>& part : space_.parts) mass += part.mass;
    double target = uniform * mass;
    const RowPart<R>* part = nullptr;
    for (const RowPart<R>& other : space_.parts) {
      if (other.mass == 0) continue;
      part = &other;
      if (target < part->mass) break;
      target -= part->mass;
    }
    if (part == nullptr) return -1;
    R buffer[kSampleBlock], weight[kSampleBlock];
    const R* z = widen(row_ + part->begin, part->n, buffer);
    weigh(z, weight, part->n);
    if (truncated_) drop_others(z, weight, part->n, part->ties);
    for (const std::int32_t token : part->excluded) weight[token - part->begin] = 0;
    const int found = kernels_.find(weight, part->n, target);
    weight[found] = 0;
    rest_mass_ = kernels_.mass(z, weight, part->n, -std::numeric_limits<R>::infinity());
    for (const RowPart<R>& other : space_.parts) rest_mass_ += &other == part ? 0 : other.mass;
    return static_cast<std::int32_t>(part->begin + found);
  }

 private:
  static constexpr bool kWidens = !std::is_same_v<Element, R>;
  static constexpr int kNarrow = 4;  // a bracket with a fourth of the tokens asked is narrow
  static constexpr std::int64_t kAll = std::numeric_limits<std::int64_t>::max();

  struct Crossing {
    bool found;  // false: what is kept is less than the target
    R floor;
    Above<R> over;  // the tokens above the floor
  };

  // Gives each part its excluded tokens.
  void exclude(std::span<const std::int32_t> tokens) {
    std::vector<std::int32_t>& excluded = space_.excluded;
    excluded.assign(tokens.begin(), tokens.end());
    std::sort(excluded.begin(), excluded.end());
    excluded.erase(std::unique(excluded.begin(), excluded.end()), excluded.end());
    auto first = excluded.begin();
    for (RowPart<R>& part : space_.parts) {
      if (first == excluded.end()) return;
      const auto last = std::find_if(
          first, excluded.end(), [&](std::int32_t token) { return token >= part.begin + part.n; });
      part.excluded = {first, last};
      first = last;
    }
  }

  // The logits of a part, -inf for excluded tokens.
  const R* remaining(const RowPart<R>& part, R* space) const {
    const R* z = widen(row_ + part.begin, part.n, space);
    if (part.excluded.empty()) return z;
    if (z != space) std::copy_n(z, part.n, space);
    for (const std::int32_t token : part.excluded) {
      space[token - part.begin] = -std::numeric_limits<R>::infinity();
    }
    return space;
  }

  // Adds excluded tokens to the sums over the whole row.
  void add_excluded() {
    const std::span<const std::int32_t> excluded = space_.excluded;
    R z[kSampleBlock];
    for (std::size_t begin = 0; begin < excluded.size(); begin += kSampleBlock) {
      const std::size_t n = std::min<std::size_t>(kSampleBlock, excluded.size() - begin);
      for (std::size_t i = 0; i < n; ++i)
        z[i] = static_cast<R>(widen_one(row_[excluded[begin + i]]));
      const SampleSums sums =
          kernels_.sums(z, static_cast<int>(n), maximum_, static_cast<R>(scale_),
                        reinterpret_cast<const char*>(z));
      sum_ += sums.sum;
      moment_ += sums.moment;
    }
  }

  // The largest logit at which `measure` of the tokens at or above it reaches `target`.
  template <typename Measure, typename Target>
  Crossing find_crossing(Measure measure, Target target) {
    R low = floor_, high = maximum_;  // it lies between them
    Above<R> over, outside;           // the tokens above high; those that are not asked any more
    std::int64_t asked = vocabulary_, at_low = vocabulary_;
    bool reached = false;
    for (double depth = 4; low < high; depth *= 2) {
      R middle = low / 2 + high / 2;
      if (!reached) middle = std::max(middle, at_depth(depth));  // most mass is near the top
      if (!(middle > low && middle < high)) middle = high;
      Above<R> found = asked == vocabulary_ ? above(middle) : above_inside(asked, middle);
      found.mass += outside.mass;
      found.moment += outside.moment;
      found.count += outside.count;
      if (measure(found) >= target) {
        low = found.least;
        at_low = found.count;
        reached = true;
      } else {
        high = found.below;
        over = found;
      }
      if (reached && low < high && kNarrow * (at_low - over.count) <= asked) {
        asked = asked == vocabulary_ ? gather(low, high) : gather_inside(asked, low, high);
        outside = over;
      }
    }
    return {low == high, high, over};
  }

  Above<R> above(R floor) {
    Above<R> sum;
    for (RowPart<R>& part : space_.parts) {
      if (part.maximum < floor) {
        sum.below = std::max(sum.below, part.maximum);
        continue;
      }
      const Above<R> found = above(part, floor);
      sum.mass += found.mass;
      sum.moment += found.moment;
      sum.count += found.count;
      sum.least = std::min(sum.least, found.least);
      sum.below = std::max(sum.below, found.below);
    }
    return sum;
  }

  // The tokens of a part with z >= floor; its tokens are weighed when they are first asked for.
  Above<R> above(RowPart<R>& part, R floor) {
    if (part.z == nullptr) {
      space_.weight.resize(static_cast<std::size_t>(vocabulary_));
      if (kWidens) space_.z.resize(static_cast<std::size_t>(vocabulary_));
      part.z = widen(row_ + part.begin, part.n, space_.z.data() + (kWidens ? part.begin : 0));
      part.weight = space_.weight.data() + part.begin;
      weigh(part.z, part.weight, part.n);
    }
    return above(part.z, part.weight, part.n, floor);
  }

  Above<R> above_inside(std::int64_t asked, R floor) const {
    return above(space_.inside_z.data(), space_.inside_weight.data(), static_cast<int>(asked),
                 floor);
  }

  Above<R> above(const R* z, const R* weight, int n, R floor) const {
    if (!sums_moments_) return kernels_.above(z, weight, n, floor);
    return kernels_.above_moment(z, weight, n, floor, maximum_, static_cast<R>(scale_));
  }

  // Copies out the tokens of the bracket; returns their number.
  std::int64_t gather(R low, R high) {
    const std::size_t most = static_cast<std::size_t>(vocabulary_ / kNarrow + kSpare);
    space_.inside_z.resize(most);
    space_.inside_weight.resize(most);
    std::int64_t found = 0;
    for (const RowPart<R>& part : space_.parts) {
      if (part.maximum < low) continue;
      found +=
          kernels_.between(part.z, part.weight, part.n, low, high, space_.inside_z.data() + found,
                           space_.inside_weight.data() + found);
    }
    return found;
  }

  std::int64_t gather_inside(std::int64_t asked, R low, R high) {
    R* z = space_.inside_z.data();
    R* weight = space_.inside_weight.data();
    return kernels_.between(z, weight, static_cast<int>(asked), low, high, z, weight);
  }

  void keep(R floor, std::int64_t ties) {
    if (floor == floor_) ties = std::min(ties, ties_);
    ties_ = ties;
    floor_ = floor;
    truncated_ = true;
    const double tie = weight_of(floor);
    kept_mass_ = 0;
    for (RowPart<R>& part : space_.parts) {
      part.mass = 0;
      part.ties = 0;
      if (part.maximum < floor) continue;
      const Above<R> over = above(part, over_floor());
      if (over.below == floor) {
        const R* z = part.z;
        part.ties = std::min<std::int64_t>(ties, std::count(z, z + part.n, floor));
        ties -= part.ties;
      }
      part.mass = over.mass + static_cast<double>(part.ties) * tie;
      kept_mass_ += part.mass;
    }
  }

  // Takes excluded tokens out of the mass that truncation has kept.
  void drop_excluded() {
    const double tie = weight_of(floor_);
    for (RowPart<R>& part : space_.parts) {
      if (part.mass == 0 || part.excluded.empty()) continue;
      std::int64_t ties = part.ties;
      for (const std::int32_t token : part.excluded) {
        const std::int64_t i = token - part.begin;
        const R* z = part.z;
        ties -= z[i] == floor_ && std::count(z, z + i, floor_) < part.ties;
        part.weight[i] = 0;
      }
      part.mass = kernels_.mass(part.z, part.weight, part.n, over_floor()) +
                  static_cast<double>(ties) * tie;
    }
  }

  // The smallest number above the floor.
  R over_floor() const { return std::nextafter(floor_, std::numeric_limits<R>::infinity()); }

  void drop_others(const R* z, R* weight, int n, std::int64_t ties) const {
    for (int i = 0; i < n; ++i) {
      const bool tie = z[i] == floor_;
      const bool keep = (z[i] > floor_) | (tie & (ties > 0));
      ties -= tie;
      weight[i] = keep ? weight[i] : R{0};
    }
  }

  // The smallest logit whose probability is no less than 2^-depth of the largest one.
  R at_depth(double depth) const {
    const double z = std::max(static_cast<double>(maximum_) - depth / scale_,
                              static_cast<double>(std::numeric_limits<R>::lowest()));
    const R nearest = static_cast<R>(z);
    const bool below = static_cast<double>(nearest) < z;
    return below ? std::nextafter(nearest, std::numeric_limits<R>::infinity()) : nearest;
  }

  void weigh(const R* z, R* weight, int n) const {
    kernels_.weights(z, weight, n, maximum_, static_cast<R>(scale_));
  }

  double weight_of(R z) const {
    R weight;
    weigh(&z, &weight, 1);
    return static_cast<double>(weight);
  }

  // As the kernels have it.
  double log2_weight(R z) const {
    const R t = (z - maximum_) * static_cast<R>(scale_);
    return static_cast<double>(std::max(t, static_cast<R>(kLowestExponent)));
  }

  // Entropy of weights 2^t with this sum, and this sum of t 2^t.
  static double bits(double sum, double moment) {
    return std::max(0.0, std::log2(sum) - moment / sum);
  }

  double log_weight(std::int32_t token) const {
    const double z = static_cast<double>(widen_one(row_[token]));
    return (z - static_cast<double>(maximum_)) / temperature_;
  }

  const SampleKernels<R>& kernels_ = sample_kernels<R>();
  const Element* row_;
  std::int64_t vocabulary_;
  double temperature_, scale_;
  RowSpace<R>& space_;
  R maximum_ = -std::numeric_limits<R>::infinity();
  double sum_ = 0, moment_ = 0;
  bool truncated_ = false;
  bool sums_moments_ = false;  // while it is asked for entropies
  R floor_{};  // what is kept: the tokens above it, and the first ones at it (RowPart::ties)
  std::int64_t ties_ = kAll;  // as many at it, if there are
  double kept_mass_ = 0;      // excluded tokens included
  double rest_mass_ = 0;      // of the tokens that could have been drawn and were not
};

}  // namespace pyrl::logits::sample
