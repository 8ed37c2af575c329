// One block of threads per row. Everything is bisected, nothing is sorted: the k-th largest logit
// by the number of tokens above a logit, the nucleus by their mass, top-h by their entropy, the
// lower ids among equal logits by the number of those before a column, and the token by the mass
// before a column. A step sweeps the row, which stays in the L2 cache, and adds in the order of
// columns alone: so a mass never falls when the set grows, and a draw does not depend on the batch.
#include <cfloat>
#include <type_traits>

#include "logits/device_threshold.cuh"
#include "logits/sample/device_sample.h"

namespace pyrl::logits::sample {
namespace device {
namespace {

using namespace logits::device;

constexpr int kConfidenceTokens = 5;
constexpr unsigned kColumns = 6;  // of out_KB

// Statistics of the untruncated row, in every thread of the block.
template <typename Element>
__device__ PartSums row_sums(const Element* row, std::int64_t vocabulary, const Wanted& wanted) {
  __shared__ PartSums of_warp[kWarps];
  __shared__ PartSums of_part[kMostParts];
  __shared__ PartSums all;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t parts = parts_of(vocabulary);
  for (std::int64_t part = 0; part < parts; ++part) {
    const std::int64_t begin = part * kPart;
    const PartSums sums = warp_sums<Element, true>(row, begin, part_end(begin, vocabulary), thread,
                                                   Softcap{0}, wanted);
    if (thread % kWarp == 0) of_warp[thread / kWarp] = sums;
    __syncthreads();
    if (thread == 0) of_part[part] = combine(of_warp, kWarps, wanted);
    __syncthreads();
  }
  if (thread == 0) all = combine(of_part, parts, wanted);
  __syncthreads();
  return all;
}

// The smallest low < x <= high for which reached(x), given that it does not fall and holds at high.
template <typename Reached>
__device__ std::int64_t smallest_true(std::int64_t low, std::int64_t high, Reached reached) {
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (reached(middle) ? high : low) = middle;
  }
  return high;
}

// The tokens that a row may not draw: those of a list, and one that is drawn already (-1: none).
struct ExcludedTokens {
  const std::int32_t* token;
  std::int64_t count;
  std::int64_t drawn;
  bool mine;  // whether this thread reads any of them

  // Sets those among the columns of a thread's group to -inf.
  template <typename Element, typename R>
  __device__ void mask(R (&group)[kGroup<Element>], std::int64_t first) const {
    if (!mine) return;
    for (std::int64_t k = 0; k <= count; ++k) {
      const std::int64_t column = (k < count ? token[k] : drawn) - first;
#pragma unroll
      for (int i = 0; i < kGroup<Element>; ++i) {
        if (column == column_in_group<Element>(i)) group[i] = R(-INFINITY);
      }
    }
  }
};

template <typename Element>
__device__ ExcludedTokens excluded_tokens(const Excluded& excluded, std::int64_t b,
                                          std::int64_t drawn) {
  ExcludedTokens tokens = {nullptr, 0, drawn, false};
  if (excluded.offset_B1 != nullptr) {
    tokens.token = excluded.token_E + excluded.offset_B1[b];
    tokens.count = excluded.offset_B1[b + 1] - excluded.offset_B1[b];
  }
  for (std::int64_t k = 0; k <= tokens.count; ++k) {
    const std::int64_t column = k < tokens.count ? tokens.token[k] : drawn;
    tokens.mine = tokens.mine || column / kVector<Element> % kThreads == threadIdx.x;
  }
  return tokens;
}

template <typename Element>
struct SampledRow {
  const Element* z;
  std::int64_t vocabulary;
  double scale;    // log2(e) / temperature
  double maximum;  // of the row
  // Kept are the tokens with z > floor, and those with z = floor before column ties_end.
  double floor;
  std::int64_t ties_end;
  ExcludedTokens excluded;  // none while it is decided what to keep
  bool entropic = false;    // whether `kept` sums t 2^t and does not count

  // The kept tokens with z >= least before column `end`: the sum of 2^t, and in `moment` that of
  // t 2^t or their number. The other two fields are about kept tokens as well.
  // Not inlined: it is called from every bisection.
  __attribute__((noinline)) __device__ Above kept(double least, std::int64_t end) const {
    using R = typename DeviceReal<Element>::type;
    const R shift = static_cast<R>(maximum), factor = static_cast<R>(scale);
    Above result = {0, 0, INFINITY, -INFINITY};
    sweep(z, 0, end, static_cast<int>(threadIdx.x),
          [&](R(&group)[kGroup<Element>], std::int64_t first) {
            excluded.template mask<Element>(group, first);
            R sum = 0, moment = 0;
#pragma unroll
            for (int i = 0; i < kGroup<Element>; ++i) {
              const double value = static_cast<double>(group[i]);
              const bool before = first + column_in_group<Element>(i) < ties_end;
              if (!(value > floor || (value == floor && before))) continue;
              if (value < least) {
                result.largest_below = fmax(result.largest_below, value);
                continue;
              }
              const R t = larger((group[i] - shift) * factor, kLeastExponent<R>);
              const R weight = base2(t);
              sum += weight;
              moment += entropic ? weight * t : R(1);
              result.smallest = fmin(result.smallest, value);
            }
            result.sum += static_cast<double>(sum);
            result.moment += static_cast<double>(moment);
          });
    return merge_block(result);
  }

  // Leaves of the kept tokens the most probable ones, as few as reach `enough`; amount: their
  // number or their mass. Of equally probable ones the lower ids stay.
  template <typename Amount>
  __device__ void keep(Amount amount, double enough) {
    const Crossing ends = crossing([this](double least) { return kept(least, vocabulary); }, amount,
                                   enough, maximum, scale);
    if (ends.with.smallest > floor) ties_end = vocabulary;
    floor = ends.with.smallest;
    if (ends.with.moment - ends.without.moment == 1) return;
    ties_end = smallest_true(0, ties_end, [&](std::int64_t end) {
      SampledRow cut = *this;
      cut.ties_end = end;
      return amount(cut.kept(floor, vocabulary)) >= enough;
    });
  }

  // Leaves of the kept tokens the most probable ones, as many as have at most this entropy (bits).
  __device__ void keep_entropy(double most) {
    const auto exceeds = [most](const Above& kept) {
      return kept.sum > 0 && log2(kept.sum) - kept.moment / kept.sum > most ? 1 : 0;
    };
    entropic = true;
    if (exceeds(kept(floor, vocabulary))) {
      keep(exceeds, 1);
      --ties_end;  // the one that lifts it above
    }
    entropic = false;
  }

  __device__ double weight(std::int64_t column) const {
    using R = typename DeviceReal<Element>::type;
    const R t = (widen_device(z[column]) - static_cast<R>(maximum)) * static_cast<R>(scale);
    return static_cast<double>(base2(larger(t, kLeastExponent<R>)));
  }

  // The token at which the cumulative mass exceeds uniform times `mass`, that of all kept ones.
  __device__ std::int64_t draw(double uniform, double mass) const {
    const double target = uniform * mass;
    const std::int64_t end = smallest_true(0, vocabulary, [&](std::int64_t columns) {
      const double sum = kept(floor, columns).sum;
      return sum > target || sum >= mass;  // rounding may lift the target to the mass
    });
    return end - 1;
  }
};

// What temperature 0, min-p, top-k, top-p and top-h keep, in this order. `bits`: entropy of the
// row.
template <typename Element>
__device__ void truncate(const Truncation& truncation, double bits, SampledRow<Element>& row) {
  const auto number = [](const Above& kept) { return kept.moment; };
  const auto mass = [](const Above& kept) { return kept.sum; };
  if (truncation.temperature == 0) {
    row.keep(number, 1);
    row.maximum = row.floor;  // so that it has a weight, wherever excluded ones lie
    return;
  }
  if (truncation.min_p > 0) {
    row.floor = fmax(row.maximum + log2(truncation.min_p) / row.scale, -DBL_MAX);
  }
  if (truncation.top_k > 0) {
    const double most = row.kept(row.floor, row.vocabulary).moment;
    const double top_k = static_cast<double>(truncation.top_k);
    if (most > top_k) row.keep(number, top_k);
  }
  if (truncation.top_p < 1) {
    row.keep(mass, truncation.top_p * row.kept(row.floor, row.vocabulary).sum);
  }
  if (truncation.top_h < 1) row.keep_entropy(truncation.top_h * bits);
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) sample_kernel(SampleRowsArgs args, Wanted wanted) {
  const std::int64_t b = blockIdx.x, rows = args.logits_BV.rows;
  const std::int64_t vocabulary = args.logits_BV.vocabulary;
  const Element* z =
      static_cast<const Element*>(args.logits_BV.data) + b * args.logits_BV.row_stride;
  const PartSums sums = row_sums(z, vocabulary, wanted);
  const auto give_up = [&] {
    if (threadIdx.x < kColumns) args.out_KB[threadIdx.x * rows + b] = threadIdx.x == 0 ? -1 : 0;
  };
  if (isnan(sums.sum) || sums.sum == 0) return give_up();
  const bool greedy = args.truncation.temperature == 0;
  const ExcludedTokens excluded = excluded_tokens<Element>(args.excluded, b, -1);
  const ExcludedTokens none = {nullptr, 0, -1, false};
  SampledRow<Element> row{
      z, vocabulary, wanted.scale, sums.maximum, -DBL_MAX, vocabulary, greedy ? excluded : none};
  const double bits = fmax(0.0, log2(sums.sum) - sums.moment / sums.sum);
  truncate(args.truncation, bits, row);
  const double kept = row.kept(row.floor, vocabulary).sum;
  row.excluded = excluded;
  const double mass = excluded.count == 0 ? kept : row.kept(row.floor, vocabulary).sum;
  if (mass == 0) return give_up();
  const std::int64_t token = row.draw(args.uniform_B[b], mass);
  // A difference is as exact as a sum, unless it is a small one.
  double rest = mass - row.weight(token);
  if (rest < mass / 2) {
    row.excluded = excluded_tokens<Element>(args.excluded, b, token);
    rest = row.kept(row.floor, vocabulary).sum;
  }
  if (threadIdx.x != 0) return;
  const double above =
      (static_cast<double>(widen_device(z[token])) - sums.maximum) * wanted.scale * kLn2;
  double confidence = 0;
  for (int k = 0; k < kConfidenceTokens; ++k) {
    confidence += exp2((sums.top[k] - sums.maximum) * wanted.scale);
  }
  args.out_KB[b] = static_cast<double>(token);
  args.out_KB[rows + b] = above - log(sums.sum);
  args.out_KB[2 * rows + b] = greedy ? 0 : above - log(kept);
  args.out_KB[3 * rows + b] = bits * kLn2;
  args.out_KB[4 * rows + b] = fmin(1.0, confidence / sums.sum);
  args.out_KB[5 * rows + b] = greedy ? -INFINITY : log(rest) - log(kept);
}

}  // namespace
}  // namespace device

void sample_rows_cuda(const SampleRowsArgs& args, int device, void* stream) {
  using namespace device;
  const LogitMatrix& logits_BV = args.logits_BV;
  check_columns("sample_tokens", logits_BV.vocabulary);
  if (logits_BV.rows == 0) return;
  Wanted wanted = {};
  const double temperature = args.truncation.temperature;
  wanted.scale = kLog2E / (temperature == 0 ? 1.0 : temperature);
  wanted.top = kConfidenceTokens;
  const DeviceGuard guard(device);
  with_elements(logits_BV, [&](const auto* z) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(z)>>;
    launch(sample_kernel<Element>, {logits_BV.rows}, static_cast<cudaStream_t>(stream), args,
           wanted);
  });
}

}  // namespace pyrl::logits::sample
