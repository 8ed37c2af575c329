// Body of policy_blocks, included by the file of each instruction set: internal linkage throughout.
#pragma once

#include "loss/kernels.h"
#include "loss/lanes.h"
#include "loss/scan_body.h"
#include "loss/sums.h"

namespace pyrl::loss {
namespace {

// The columns of eight tokens from t on.
struct Group {
  const Column* columns;
  std::size_t t;
  // Numbers of these tokens that take the place of a column; null: none.
  const double* log_ratio;
  const double* low;
  const double* high;
  const double* dual;

  PYRL_INLINE const double* own(TokenColumn name) const {
    if (name == TokenColumn::log_ratio) return log_ratio;
    if (name == TokenColumn::low) return low;
    if (name == TokenColumn::high) return high;
    return name == TokenColumn::dual ? dual : nullptr;
  }
  PYRL_INLINE bool has(TokenColumn name) const {
    return own(name) || columns[static_cast<int>(name)];
  }
  PYRL_INLINE Lanes operator()(TokenColumn name) const {
    if (own(name)) return load(own(name));
    const Column& column = columns[static_cast<int>(name)];
    return column.wide ? load(column.wide + t) : load(column.narrow + t);
  }
};

// Walks along responses: what a token takes from its response and its position there.
struct Cursor {
  std::size_t leaf;
  std::int64_t position = 0;  // tokens of the response so far that take part
  double weight[kLanes] = {}, low[kLanes] = {}, high[kLanes] = {}, dual[kLanes] = {};

  // Weights of the tokens t to t + n; of those up to kLanes: 0.
  PYRL_INLINE Lanes weights(const PolicyChunk& chunk, std::size_t t, int n) {
    const PolicyLossArgs& args = *chunk.args;
    const std::int64_t* offset_N1 = args.responses.offset_N1;
    const auto stop = static_cast<std::int64_t>(t) + kLanes;
    if (n == kLanes && !chunk.low && !args.responses.mask_T && stop <= offset_N1[leaf + 1])
      return args.weight_N[leaf];
    for (int i = 0; i < kLanes; ++i)
      weight[i] = i < n ? next(chunk, t + static_cast<std::size_t>(i), i) : 0.0;
    return load(weight);
  }

 private:
  double next(const PolicyChunk& chunk, std::size_t t, int i) {
    const Responses& responses = chunk.args->responses;
    for (; responses.offset_N1[leaf + 1] <= static_cast<std::int64_t>(t); ++leaf) position = 0;
    if (chunk.low) {
      low[i] = chunk.low[position];
      high[i] = chunk.high[position];
      dual[i] = chunk.dual[position];
    }
    const bool used = responses.used(t);
    position += used;
    return used ? chunk.args->weight_N[leaf] : 0.0;
  }
};

Group group_of(const PolicyChunk& chunk, const Cursor& cursor) {
  Group group{chunk.args->column, chunk.begin, chunk.log_ratio, nullptr, nullptr, nullptr};
  if (!chunk.low) return group;
  group.low = cursor.low;
  group.high = cursor.high;
  group.dual = cursor.dual;
  return group;
}

// The last tokens of a chunk, fewer than eight, and zeros.
struct Rest {
  double values[kTokenColumns][kLanes] = {};
  Column columns[kTokenColumns];

  Rest(const Column* from, std::size_t t, int n) {
    for (int c = 0; c < kTokenColumns; ++c) {
      if (!from[c]) continue;
      for (int i = 0; i < n; ++i) values[c][i] = from[c][t + static_cast<std::size_t>(i)];
      columns[c].wide = values[c];
    }
  }
};

struct Output {
  void* values;  // null: not asked for
  bool wide;

  PYRL_INLINE void put(const Lanes& lanes, std::size_t t, int n) const {
    if (!values) return;
    if (n == kLanes && wide) return store(lanes, static_cast<double*>(values) + t);
    if (n == kLanes) return store(lanes, static_cast<float*>(values) + t);
    double rest[kLanes];
    store(lanes, rest);
    for (int i = 0; i < n; ++i, ++t) {
      if (wide)
        static_cast<double*>(values)[t] = rest[i];
      else
        static_cast<float*>(values)[t] = static_cast<float>(rest[i]);
    }
  }
};

// PolicySums in registers.
struct Sums : TokenSums<Lanes> {
  Mask wrong;

  PYRL_INLINE explicit Sums(const PolicySums& from)
      : TokenSums<Lanes>{
            load(from.loss.lane),         load(from.weight.lane),       load(from.clipped_low.lane),
            load(from.clipped_high.lane), load(from.clipped_dual.lane), load(from.kl_old.lane),
            load(from.penalty.lane),      load(from.ratio.lane),        load(from.ratio_max.lane)},
        wrong(Lanes(0.0) < Lanes(0.0)) {}

  void save(PolicySums& to) const {
    store(loss, to.loss.lane);
    store(weight, to.weight.lane);
    store(clipped_low, to.clipped_low.lane);
    store(clipped_high, to.clipped_high.lane);
    store(clipped_dual, to.clipped_dual.lane);
    store(kl_old, to.kl_old.lane);
    store(penalty, to.penalty.lane);
    store(ratio, to.ratio.lane);
    store(ratio_max, to.ratio_max.lane);
    double flags[kLanes];
    store(select(wrong, 1.0, 0.0), flags);
    for (const double flag : flags) to.refused = to.refused || flag != 0;
  }
};

PYRL_INLINE void visit_tokens(const token::Kinds& kinds, const PolicyChunk& chunk,
                              PolicySums& result) {
  const PolicyLossArgs& args = *chunk.args;
  const TokenSpec spec = args.spec;  // a copy: the outputs are doubles too
  const Output loss{args.loss_T, args.wide}, logprob_grad{args.logprob_grad_T, args.wide},
      entropy_slope{args.entropy_grad_T, args.wide};
  const int rest_size = static_cast<int>((chunk.end - chunk.begin) % kLanes);
  const Rest rest(args.column, chunk.end - static_cast<std::size_t>(rest_size), rest_size);
  Sums sums(result);
  Cursor cursor{chunk.leaf};
  Group group = group_of(chunk, cursor);
  for (std::size_t t = chunk.begin; t < chunk.end; t += kLanes) {
    const int n = static_cast<int>(std::min<std::size_t>(kLanes, chunk.end - t));
    if (n == kLanes) {
      group.t = t;
    } else {
      group.t = 0;
      group.columns = rest.columns;
    }
    if (chunk.log_ratio) group.log_ratio = chunk.log_ratio + (t - chunk.begin);
    const Lanes weight = cursor.weights(chunk, t, n);
    const Lanes advantage = group(TokenColumn::advantage);
    const TokenTerm<Lanes> term = token_term(kinds, spec, group, advantage, weight);
    loss.put(term.loss, t, n);
    logprob_grad.put(term.logprob_grad, t, n);
    if (args.entropy_grad_T) entropy_slope.put(entropy_grad(spec, weight), t, n);
    add(sums, term, kinds, spec, weight);
    sums.wrong = sums.wrong | refused(spec, group, advantage, weight);
  }
  sums.save(result);
}

// A loop of its own, of which `kinds` takes the constants.
template <SurrogateKind surrogate, bool one>
void visit_plain(token::Kinds kinds, const PolicyChunk& chunk, PolicySums& sums) {
  kinds.surrogate = surrogate;
  kinds.one = one;
  kinds.plain = true;
  visit_tokens(kinds, chunk, sums);
}

void policy_blocks(const PolicyChunk& chunk, PolicySums& sums) {
  const Cursor cursor{chunk.leaf};
  const token::Kinds kinds = token::kinds_of(chunk.args->spec, group_of(chunk, cursor));
  using Kind = SurrogateKind;
  const bool logp = kinds.surrogate == Kind::mask_logp;
  if (!kinds.plain || (kinds.one && !logp)) return visit_tokens(kinds, chunk, sums);
  if (kinds.one) return visit_plain<Kind::mask_logp, true>(kinds, chunk, sums);
  switch (kinds.surrogate) {
    case Kind::ppo:
      return visit_plain<Kind::ppo, false>(kinds, chunk, sums);
    case Kind::mask_logp:
      return visit_plain<Kind::mask_logp, false>(kinds, chunk, sums);
    case Kind::clamp_logp:
      return visit_plain<Kind::clamp_logp, false>(kinds, chunk, sums);
    case Kind::gppo:
      return visit_plain<Kind::gppo, false>(kinds, chunk, sums);
    case Kind::sigmoid:
      return visit_plain<Kind::sigmoid, false>(kinds, chunk, sums);
  }
}

constexpr PolicyKernels kPolicyKernels{policy_blocks, scan_log_ratio};

}  // namespace
}  // namespace pyrl::loss
