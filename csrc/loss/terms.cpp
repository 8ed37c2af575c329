#include "loss/terms.h"

#include <limits>

#include "loss/kernels.h"
#include "loss/math.h"
#include "loss/statistics.h"

namespace pyrl::loss {
namespace {

constexpr double kLogLimit = 20;

// log(old / rollout) of a block.
void log_mismatch(const LossColumns& in, TokenBlock& block, double* out) {
  const double* old = block(in.old_logprob);
  const double* rollout = block(in.rollout_logprob);
  for (int i = 0; i < block.n; ++i) out[i] = old[i] - rollout[i];
  block.buffers -= 2;
}

double bounded_exp(double x) { return std::exp(std::clamp(x, -kLogLimit, kLogLimit)); }

void scale_all(const Responses& responses, double scale, double* values_T) {
  for (std::size_t t = 0; t < responses.tokens; ++t) values_T[t] *= scale;
}

void response_importance(const LossColumns& in, double cap, double floor, bool normalize,
                         double* factor_T) {
  double sum = 0;
  std::int64_t responses = 0;
  visit_leaves(in.responses, [&](std::size_t, std::size_t begin, std::size_t end) {
    const double x = sum_tokens(in.responses, begin, end, [&](TokenBlock& block, double* out) {
      log_mismatch(in, block, out);
    });
    const double factor = std::min(std::max(bounded_exp(x), floor), cap);
    std::fill(factor_T + begin, factor_T + end, factor);
    if (count_tokens(in.responses, begin, end) == 0) return;
    sum += factor;
    ++responses;
  });
  if (normalize && sum > 0) scale_all(in.responses, static_cast<double>(responses) / sum, factor_T);
}

}  // namespace

void entropy_advantage(const LossColumns& in, double k, double* advantage_T) {
  const Moments entropy = moments(in.responses, value_of(in.entropy));
  const double deviation = entropy.unbiased();
  const double slope = deviation > 1e-12 ? k / deviation : 0.0;
  visit_tokens(in.responses, [&](TokenBlock& block) {
    const double* advantage = block(in.advantage);
    const double* h = block(in.entropy);
    for (int i = 0; i < block.n; ++i)
      advantage_T[block.begin + i] = advantage[i] * (1.0 + slope * (h[i] - entropy.mean));
  });
}

void blend_advantage(const LossColumns& in, double target, double limit, double measured,
                     double* advantage_T) {
  double responses = 0, rewarded = 0;
  visit_leaves(in.responses, [&](std::size_t, std::size_t begin, std::size_t end) {
    for (std::size_t t = begin; t < end; ++t) {
      if (!in.responses.used(t)) continue;
      responses += 1;
      rewarded += in.reward[t] > 0;
      return;
    }
  });
  const double a =
      rewarded > 0 ? std::min(std::abs(target - measured), limit) * responses / rewarded : 0.0;
  const double alpha = a / (1.0 + a);
  visit_tokens(in.responses, [&](TokenBlock& block) {
    const double* advantage = block(in.advantage);
    const double* reward = block(in.reward);
    const double* second = block(in.second_logprob);
    const double* old = block(in.old_logprob);
    double* ratio = block.work();
    for (int i = 0; i < block.n; ++i) ratio[i] = clamped(second[i] - old[i], -20.0, 20.0);
    policy_kernels().exp(ratio, block.n);
    for (int i = 0; i < block.n; ++i)
      advantage_T[block.begin + i] = (1.0 - alpha) * advantage[i] + alpha * reward[i] * ratio[i];
  });
}

void token_group_advantage(const LossColumns& in, double limit, double* advantage_T) {
  struct Group {
    double count = 0, sum = 0, squares = 0, most = 0;
  };
  std::vector<Group> groups;
  const auto of = [&](std::size_t leaf) -> Group& {
    const auto group = static_cast<std::size_t>(in.group_N[leaf]);
    if (group >= groups.size()) groups.resize(group + 1);
    return groups[group];
  };
  visit_leaves(in.responses, [&](std::size_t leaf, std::size_t begin, std::size_t end) {
    of(leaf).count += count_tokens(in.responses, begin, end);
    of(leaf).sum += sum_tokens(in.responses, begin, end, value_of(in.reward));
  });
  visit_leaves(in.responses, [&](std::size_t leaf, std::size_t begin, std::size_t end) {
    Group& group = of(leaf);
    const double mean = group.sum / group.count;
    group.squares += sum_tokens(in.responses, begin, end, [&](TokenBlock& block, double* out) {
      const double* reward = block(in.reward);
      for (int i = 0; i < block.n; ++i) {
        const double x = reward[i] - mean;
        group.most = larger(group.most, block.used[i] * magnitude(x));
        out[i] = x * x;
      }
      --block.buffers;
    });
  });
  visit_leaves(in.responses, [&](std::size_t leaf, std::size_t begin, std::size_t end) {
    const Group& group = of(leaf);
    const double mean = group.sum / group.count;
    // The released code's epsilon.
    const double scale = 1.0 / (std::sqrt(group.squares / std::max(group.count, 1.0)) + 1e-6);
    const Column& from = group.most * scale >= limit ? in.advantage : in.reward;
    const bool kept = &from == &in.advantage;
    const double shift = kept ? 0.0 : mean, factor = kept ? 1.0 : scale;
    visit_tokens(in.responses, begin, end, [&](TokenBlock& block) {
      const double* x = block(from);
      for (int i = 0; i < block.n; ++i) advantage_T[block.begin + i] = (x[i] - shift) * factor;
    });
  });
}

void band_advantage(const LossColumns& in, double low, double high, double* advantage_T) {
  const double entropy = mean(in.responses, value_of(in.entropy));
  visit_tokens(in.responses, [&](TokenBlock& block) {
    const double* advantage = block(in.advantage);
    const double* reward = block(in.reward);
    for (int i = 0; i < block.n; ++i)
      advantage_T[block.begin + i] = entropy > high  ? std::max(reward[i], 0.0)
                                     : entropy < low ? std::min(reward[i], 0.0)
                                                     : advantage[i];
    for (int i = 0; i < block.n; ++i)
      PYRL_CHECK(block.used[i] == 0 || std::abs(reward[i]) == 1,
                 "EntropyBand: expected rewards of -1 or 1, got ", reward[i], " at ",
                 block.begin + static_cast<std::size_t>(i));
  });
}

void sign_advantage(const LossColumns& in, bool positive, double* advantage_T) {
  visit_tokens(in.responses, [&](TokenBlock& block) {
    const double* advantage = block(in.advantage);
    for (int i = 0; i < block.n; ++i)
      advantage_T[block.begin + i] =
          positive ? std::max(advantage[i], 0.0) : std::min(advantage[i], 0.0);
  });
}

void expert_scale(const LossColumns& in, double passed, double* scale_T) {
  visit_tokens(in.responses, [&](TokenBlock& block) {
    const double* advantage = block(in.advantage);
    const double* reward = block(in.reward);
    for (int i = 0; i < block.n; ++i) {
      const double size = std::abs(advantage[i]);
      scale_T[block.begin + i] = reward[i] > passed ? -size : size;
    }
  });
}

void importance(const LossColumns& in, Level level, double cap, double floor, bool normalize,
                double* factor_T) {
  if (level != Level::token) return response_importance(in, cap, floor, normalize, factor_T);
  LaneSum sum;
  visit_tokens(in.responses, [&](TokenBlock& block) {
    double* factor = factor_T + block.begin;
    log_mismatch(in, block, factor);
    for (int i = 0; i < block.n; ++i) factor[i] = std::clamp(factor[i], -kLogLimit, kLogLimit);
    policy_kernels().exp(factor, block.n);
    for (int i = 0; i < block.n; ++i) factor[i] = std::min(std::max(factor[i], floor), cap);
    double* used = block.work();
    for (int i = 0; i < block.n; ++i) used[i] = block.used[i] != 0 ? factor[i] : 0.0;
    add(sum, used, block.n);
  });
  if (normalize && total(sum) > 0)
    scale_all(in.responses, count_tokens(in.responses, 0, in.responses.tokens) / total(sum),
              factor_T);
}

void importance_window(const LossColumns& in, double low, double high, double* factor_T) {
  importance(in, Level::token, std::numeric_limits<double>::infinity(), 0, false, factor_T);
  for (std::size_t t = 0; t < in.responses.tokens; ++t)
    factor_T[t] = factor_T[t] >= low && factor_T[t] <= high ? factor_T[t] : 0.0;
}

void steer(const LossColumns& in, bool exponential, double least, double most, double* factor_T) {
  double smallest = std::numeric_limits<double>::infinity(), largest = 0;
  visit_tokens(in.responses, [&](TokenBlock& block) {
    const double* logprob = block(in.logprob);
    const double* old = block(in.old_logprob);
    const double* advantage = block(in.advantage);
    const double* entropy = block(in.entropy);
    double* ratio = block.work();
    double* p = block.work();
    for (int i = 0; i < block.n; ++i) {
      ratio[i] = std::clamp(logprob[i] - old[i], -kLogLimit, kLogLimit);
      p[i] = logprob[i];
    }
    policy_kernels().exp(ratio, block.n);
    policy_kernels().exp(p, block.n);
    double* change = factor_T + block.begin;
    for (int i = 0; i < block.n; ++i)
      change[i] = std::abs(ratio[i] * advantage[i] * (1.0 - p[i]) * (logprob[i] + entropy[i]));
    for (int i = 0; i < block.n; ++i) {
      smallest = std::min(smallest, block.used[i] != 0 ? change[i] : smallest);
      largest = std::max(largest, block.used[i] != 0 ? change[i] : largest);
    }
  });
  const double span = largest - smallest;
  const double slope = span > 0 ? (most - least) / span : 0.0;
  const double rate = std::log(least) / std::max(largest, 0.02);
  for_blocks(0, in.responses.tokens, [&](std::size_t t, int n) {
    double* factor = factor_T + t;
    if (exponential) {
      for (int i = 0; i < n; ++i) factor[i] *= rate;
      policy_kernels().exp(factor, n);
      for (int i = 0; i < n; ++i) factor[i] = std::clamp(factor[i], least, 1.0);
    } else {
      for (int i = 0; i < n; ++i)
        factor[i] = std::clamp(most - (factor[i] - smallest) * slope, least, most);
    }
  });
}

void entropy_heat(const LossColumns& in, double* heat_T) {
  // The logarithm grows: its quantile and ends are those of the entropy.
  std::vector<double> values =
      used_values("entropy_T", in.entropy, in.responses, 0, in.responses.tokens);
  if (values.empty()) return std::fill(heat_T, heat_T + in.responses.tokens, 0.0);
  const Range range = range_of(values);
  double log_of[3] = {range.least, range.most, nearest_rank(values, 0.8)};
  for (double& x : log_of) x = std::max(x, 1e-8);
  policy_kernels().log(log_of, 3);
  const double pivot = log_of[2];
  // The scale by the deviation about the pivot cancels when both sides are scaled to 1.
  const double up = log_of[1] > pivot ? 1.0 / (log_of[1] - pivot) : 0.0;
  const double down = log_of[0] < pivot ? 1.0 / (pivot - log_of[0]) : 0.0;
  visit_tokens(in.responses, [&](TokenBlock& block) {
    const double* entropy = block(in.entropy);
    double* heat = heat_T + block.begin;
    for (int i = 0; i < block.n; ++i) heat[i] = larger(block.used[i] != 0 ? entropy[i] : 1.0, 1e-8);
    policy_kernels().log(heat, block.n);
    for (int i = 0; i < block.n; ++i) {
      const double away = heat[i] - pivot;
      heat[i] = block.used[i] * (larger(away, 0.0) * up + smaller(away, 0.0) * down);
    }
  });
}

void entropy_band(const LossColumns& in, Level level, double low, double high, double height,
                  double* addend_T) {
  const auto outside = [&](double entropy) {
    return low < entropy && entropy < high ? 0.0 : height;
  };
  if (level == Level::token) {
    visit_tokens(in.responses, [&](TokenBlock& block) {
      const double* entropy = block(in.entropy);
      for (int i = 0; i < block.n; ++i) addend_T[block.begin + i] = outside(entropy[i]);
    });
    return;
  }
  visit_leaves(in.responses, [&](std::size_t, std::size_t begin, std::size_t end) {
    const double sum = sum_tokens(in.responses, begin, end, value_of(in.entropy));
    const double count = count_tokens(in.responses, begin, end);
    std::fill(addend_T + begin, addend_T + end, count > 0 ? outside(sum / count) : 0.0);
  });
}

double nucleus_peaks(const LossColumns& in, double quantile, double* weight_T) {
  double sum = 0, rows = 0;
  visit_leaves(in.responses, [&](std::size_t, std::size_t begin, std::size_t end) {
    std::fill(weight_T + begin, weight_T + end, 0.0);
    std::vector<double> values =
        used_values("nucleus_entropy_T", in.nucleus_entropy, in.responses, begin, end);
    if (values.empty()) return;
    const double threshold = linear_quantile(values, quantile);
    double peaks = 0, row = 0;
    for (std::size_t t = begin; t < end; ++t) {
      if (!in.responses.used(t) || !(in.nucleus_entropy[t] > threshold)) continue;
      row += in.nucleus_entropy[t];
      peaks += 1;
      weight_T[t] = 1;
    }
    if (peaks == 0) return;
    for (std::size_t t = begin; t < end; ++t) weight_T[t] /= peaks;
    sum += row / peaks;
    rows += 1;
  });
  if (rows == 0) return 0;
  scale_all(in.responses, 1.0 / rows, weight_T);
  return sum / rows;
}

void count_tokens(const Responses& responses, std::int64_t* tokens_N) {
  visit_leaves(responses, [&](std::size_t leaf, std::size_t begin, std::size_t end) {
    tokens_N[leaf] = static_cast<std::int64_t>(count_tokens(responses, begin, end));
  });
}

}  // namespace pyrl::loss
