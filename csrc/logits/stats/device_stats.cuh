// From a row's sums to its statistics, and which of them are asked for.
#pragma once

#include "logits/device_threshold.cuh"
#include "logits/stats/device_gradient.cuh"

namespace pyrl::logits::stats::device {

__host__ __device__ inline double* stat(const TokenStatsArgs& args, Stat name) {
  return args.stat_T[static_cast<int>(name)];
}

__device__ inline void write(const TokenStatsArgs& args, Stat name, std::int64_t t, double value) {
  if (stat(args, name) != nullptr) stat(args, name)[t] = value;
}

__device__ inline void write_all(const TokenStatsArgs& args, std::int64_t t, double value) {
  for (int name = 0; name < kStats; ++name) write(args, static_cast<Stat>(name), t, value);
}

__host__ __device__ inline bool wants_nucleus(const TokenStatsArgs& args) {
  return stat(args, Stat::nucleus_entropy) != nullptr ||
         stat(args, Stat::nucleus_threshold) != nullptr ||
         stat(args, Stat::nucleus_log_mass) != nullptr;
}

// What the sweep must add beyond the sums of logprob, entropy and logsumexp.
inline Wanted wanted_by(const TokenStatsArgs& args) {
  const TokenStatsOptions& options = args.options;
  Wanted wanted = {};
  wanted.scale = kLog2E / options.temperature;
  if (stat(args, Stat::second_logprob) != nullptr) {
    wanted.second = options.temperature / options.second_temperature;
  }
  wanted.squares = stat(args, Stat::sum_p2) != nullptr || stat(args, Stat::sum_p2_logp) != nullptr;
  wanted.logits = stat(args, Stat::self_certainty) != nullptr;
  if (stat(args, Stat::confidence) != nullptr) wanted.top = options.top_k;
  return wanted;
}

inline bool wants_more(const Wanted& wanted) {
  return wanted.second != 0 || wanted.squares || wanted.logits || wanted.top > 0;
}

__device__ inline bool is_label(std::int64_t label, std::int64_t vocabulary) {
  return label >= 0 && label < vocabulary;
}

template <typename Element>
__device__ const Element* row_of(const LogitMatrix& logits_TV, std::int64_t t) {
  return static_cast<const Element*>(logits_TV.data) + t * logits_TV.row_stride;
}

// After the soft cap.
template <typename Element>
__device__ double label_logit(const Element* row, std::int64_t label,
                              const TokenStatsOptions& options) {
  return static_cast<double>(Softcap{options.softcap}.of(widen_device(row[label])));
}

// The largest exponent in units of what is too far.
__device__ inline double distance(const TokenStatsArgs& args, const PartSums& sums) {
  const bool wide = args.logits_TV.dtype == Dtype::float64;
  const double exponent = sums.maximum * kLog2E / args.options.temperature;
  return exponent / (wide ? kFarthestOfFloat64 : kFarthest);
}

__device__ inline bool broken(const TokenStatsArgs& args, const PartSums& sums) {
  return isnan(sums.sum) || distance(args, sums) >= 1;
}

__device__ inline bool masked_alone(const TokenStatsArgs& args, const PartSums& sums) {
  return sums.sum == 0 || distance(args, sums) <= -1;
}

// z_label: after the soft cap.
__device__ inline void write_stats(const TokenStatsArgs& args, std::int64_t t, const PartSums& sums,
                                   double z_label) {
  if (broken(args, sums)) return write_all(args, t, NAN);
  if (masked_alone(args, sums)) {
    write_all(args, t, 0);
    write(args, Stat::logprob, t, -INFINITY);
    write(args, Stat::logsumexp, t, -INFINITY);
    return;
  }
  const TokenStatsOptions& options = args.options;
  const double above = z_label - sums.maximum, log_sum = log(sums.sum);
  const double logsumexp = sums.maximum / options.temperature + log_sum;
  const double vocabulary = static_cast<double>(args.logits_TV.vocabulary);
  write(args, Stat::logprob, t, above / options.temperature - log_sum);
  write(args, Stat::entropy, t, fmax(0.0, log_sum - sums.moment / sums.sum * kLn2));
  write(args, Stat::logsumexp, t, logsumexp);
  write(args, Stat::self_certainty, t,
        logsumexp - sums.logits / vocabulary / options.temperature - log(vocabulary));
  write(args, Stat::max_probability, t, 1 / sums.sum);
  write(args, Stat::sum_p2, t, sums.squares / sums.sum / sums.sum);
  write(args, Stat::sum_p2_logp, t,
        (sums.squares_at * kLn2 - sums.squares * log_sum) / sums.sum / sums.sum);
  write(args, Stat::second_logprob, t, above / options.second_temperature - log(sums.second));
  if (stat(args, Stat::confidence) == nullptr) return;
  double mass = 0;
  for (int k = 0; k < options.top_k; ++k) {
    mass += exp2((sums.top[k] - sums.maximum) * kLog2E / options.temperature);
  }
  write(args, Stat::confidence, t, fmin(1.0, mass / sums.sum));
}

// `inside`: the sums over the nucleus, which may be empty; `sum`: of the row.
__device__ inline void write_nucleus(const TokenStatsArgs& args, std::int64_t t,
                                     const Above& inside, double sum) {
  const bool empty = inside.sum == 0;
  const double entropy = empty ? 0 : log(inside.sum) - inside.moment / inside.sum * kLn2;
  write(args, Stat::nucleus_entropy, t, fmax(0.0, entropy));
  write(args, Stat::nucleus_threshold, t, empty ? INFINITY : inside.smallest);
  write(args, Stat::nucleus_log_mass, t, fmin(0.0, log(inside.sum / sum)));
}

__device__ inline RowUpstream row_upstream(const TokenStatsGradArgs& args, std::int64_t t) {
  const auto read = [t](const double* const* column_T, Stat name) {
    const double* column = column_T[static_cast<int>(name)];
    return column == nullptr ? 0.0 : column[t];
  };
  RowUpstream row;
  row.entropy = read(args.stat_T, Stat::entropy);
  row.logsumexp = read(args.stat_T, Stat::logsumexp);
  row.nucleus_entropy = read(args.stat_T, Stat::nucleus_entropy);
  row.nucleus_threshold = read(args.stat_T, Stat::nucleus_threshold);
  row.nucleus_log_mass = read(args.stat_T, Stat::nucleus_log_mass);
  row.grad_logprob = read(args.grad_T, Stat::logprob);
  row.grad_entropy = read(args.grad_T, Stat::entropy);
  row.grad_logsumexp = read(args.grad_T, Stat::logsumexp);
  row.grad_self_certainty = read(args.grad_T, Stat::self_certainty);
  row.grad_nucleus = read(args.grad_T, Stat::nucleus_entropy);
  return row;
}

// Columns begin <= column < end of a row's gradient.
template <typename Element>
__device__ void write_part_gradient(const Element* row, std::int64_t begin, std::int64_t end,
                                    int thread, std::int64_t vocabulary, std::int64_t label,
                                    const RowUpstream& upstream, const TokenStatsOptions& options,
                                    Element* out) {
  if (label == kIgnoredLabel || !upstream.asks()) {
    return fill_gradient(0, begin, end, thread, out);
  }
  if (!is_label(label, vocabulary) || isnan(upstream.logsumexp)) {
    return fill_gradient(NAN, begin, end, thread, out);
  }
  if (upstream.logsumexp == -INFINITY) return fill_gradient(0, begin, end, thread, out);
  const RowGradient<typename DeviceReal<Element>::type> gradient(upstream, options, vocabulary);
  write_gradient(row, begin, end, thread, label, gradient, out);
}

}  // namespace pyrl::logits::stats::device
