// Body of policy_blocks, included by the file of each instruction set: internal linkage throughout.
#pragma once

#include "policy_blocks.h"

namespace pyrl {
namespace {

// Walks along responses while blocks of tokens are filled.
struct Cursor {
  std::size_t leaf;
  std::int64_t position = 0;  // tokens of the response so far that take part
};

struct Buffers {
  double column[kTokenColumns][kTokenBlock];
};

double* buffer_of(Buffers& buffers, TokenColumn name) {
  return buffers.column[static_cast<int>(name)];
}

// Weights and bounds of tokens that depend on the response and the position in it alone.
void fill_by_response(const PolicyChunk& chunk, std::size_t begin, int n, Cursor& cursor,
                      Buffers& buffers) {
  const PolicyLossArgs& args = *chunk.args;
  double* weight = buffer_of(buffers, TokenColumn::weight);
  double* low = buffer_of(buffers, TokenColumn::low);
  double* high = buffer_of(buffers, TokenColumn::high);
  double* dual = buffer_of(buffers, TokenColumn::dual);
  for (int i = 0; i < n;) {
    const std::int64_t t = static_cast<std::int64_t>(begin) + i;
    while (args.segments.offset_N1[cursor.leaf + 1] <= t) {
      ++cursor.leaf;
      cursor.position = 0;
    }
    const std::int64_t rest = args.segments.offset_N1[cursor.leaf + 1] - t;
    const int stop = rest < n - i ? i + static_cast<int>(rest) : n;
    if (args.weight_N)
      for (int j = i; j < stop; ++j) weight[j] = args.weight_N[cursor.leaf];
    for (; chunk.low && i < stop; ++i) {
      const std::int64_t position = cursor.position;
      low[i] = chunk.low[position];
      high[i] = chunk.high[position];
      dual[i] = chunk.dual[position];
      const std::uint8_t* mask_T = args.segments.mask_T;
      cursor.position = position + (mask_T ? mask_T[begin + static_cast<std::size_t>(i)] != 0 : 1);
    }
    i = stop;
  }
}

TokenColumns block_columns(const PolicyChunk& chunk, std::size_t begin, int n, Cursor& cursor,
                           Buffers& buffers) {
  const PolicyLossArgs& args = *chunk.args;
  TokenColumns in;
  for (int c = 0; c < kTokenColumns; ++c) {
    const Column& column = args.column[c];
    const bool given = column.narrow || column.wide;
    in.column[c] = given ? read(column, begin, n, buffers.column[c]) : nullptr;
  }
  const auto filled = [&](TokenColumn name) {
    in.column[static_cast<int>(name)] = buffer_of(buffers, name);
  };
  if (args.weight_N || chunk.low) fill_by_response(chunk, begin, n, cursor, buffers);
  if (chunk.low) {
    filled(TokenColumn::low);
    filled(TokenColumn::high);
    if (args.position.dual > 0) filled(TokenColumn::dual);
  }
  if (chunk.log_ratio)
    in.column[static_cast<int>(TokenColumn::log_ratio)] = chunk.log_ratio + (begin - chunk.begin);
  double* weight = buffer_of(buffers, TokenColumn::weight);
  if (!args.weight_N && column(in, TokenColumn::weight) != weight)
    for (int i = 0; i < n; ++i) weight[i] = column(in, TokenColumn::weight)[i];
  filled(TokenColumn::weight);
  if (args.segments.mask_T)
    for (int i = 0; i < n; ++i) weight[i] = args.segments.mask_T[begin + i] ? weight[i] : 0.0;
  return in;
}

void store(const double* values, int n, std::size_t begin, bool wide, void* to) {
  if (!to) return;
  if (wide) {
    for (int i = 0; i < n; ++i) static_cast<double*>(to)[begin + i] = values[i];
  } else {
    for (int i = 0; i < n; ++i) static_cast<float*>(to)[begin + i] = static_cast<float>(values[i]);
  }
}

// Adds `value(i)` of the tokens up to n.
template <typename Value>
void add_each(LaneSum& sum, int n, Value value) {
  double lane[8];
  for (int j = 0; j < 8; ++j) lane[j] = sum.lane[j];
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) lane[j] += value(i + j);
  for (int j = 0; i < n; ++i, ++j) lane[j] += value(i);
  for (int j = 0; j < 8; ++j) sum.lane[j] = lane[j];
}

void add_block(const TokenSpec& spec, const TokenColumns& in, int n,
               const TokenLosses<kTokenBlock>& out, PolicySums& sums) {
  const double* weight = column(in, TokenColumn::weight);
  add_each(sums.loss, n, [&](int i) { return weight[i] * out.loss[i]; });
  add(sums.weight, weight, n);
  if (spec.bounds != static_cast<double>(BoundsKind::none)) {
    add(sums.clipped_low, out.clipped_low, n);
    add(sums.clipped_high, out.clipped_high, n);
  }
  if (column(in, TokenColumn::dual) || spec.dual < kInfinity)
    add(sums.clipped_dual, out.clipped_dual, n);
  if (spec.penalty[0] != 0)
    add_each(sums.penalty, n,
             [&](int i) { return weight[i] != 0 ? weight[i] * out.penalty[i] : 0.0; });
  add_each(sums.ratio, n, [&](int i) { return weight[i] * out.ratio[i]; });
  if (spec.ratio == static_cast<double>(RatioKind::one)) return;
  add_each(sums.kl_old, n,
           [&](int i) { return weight[i] * ((out.ratio[i] - 1.0) - out.log_ratio[i]); });
  double most[8] = {};
  const auto used = [&](int i) { return weight[i] != 0 ? out.ratio[i] : 0.0; };
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) most[j] = larger(most[j], used(i + j));
  for (int j = 0; i < n; ++i, ++j) most[j] = larger(most[j], used(i));
  for (int j = 0; j < 8; ++j) sums.ratio_max.lane[j] = larger(sums.ratio_max.lane[j], most[j]);
}

bool refused(const TokenSpec& spec, const TokenColumns& in, int n) {
  const double* weight = column(in, TokenColumn::weight);
  const double* advantage = column(in, TokenColumn::advantage);
  const double* low = column(in, TokenColumn::low);
  const double* high = column(in, TokenColumn::high);
  LaneSum wrong;  // an integer's `or` would not fit the lanes of the comparisons
  add_each(wrong, n, [&](int i) {
    const double used = weight[i] != 0 ? 1.0 : 0.0;
    return magnitude(advantage[i]) < kInfinity ? 0.0 : used;
  });
  if (low && high && spec.bounds == static_cast<double>(BoundsKind::radius))
    add_each(wrong, n, [&](int i) {
      const double used = weight[i] != 0 ? 1.0 : 0.0;
      return smaller(low[i], high[i]) >= 0 ? 0.0 : used;
    });
  return total(wrong) != 0;
}

void policy_blocks(const PolicyChunk& chunk, PolicySums& sums) {
  const PolicyLossArgs& args = *chunk.args;
  Cursor cursor{chunk.leaf};
  Buffers buffers;
  TokenLosses<kTokenBlock> out;
  for (std::size_t t = chunk.begin; t < chunk.end; t += kTokenBlock) {
    const std::size_t rest = chunk.end - t;
    const int n = rest < kTokenBlock ? static_cast<int>(rest) : kTokenBlock;
    const TokenColumns in = block_columns(chunk, t, n, cursor, buffers);
    token_losses(args.spec, in, n, out);
    store(out.loss, n, t, args.wide, args.loss_T);
    store(out.logprob_grad, n, t, args.wide, args.logprob_grad_T);
    if (args.entropy_grad_T) {
      const double* weight = column(in, TokenColumn::weight);
      double slope[kTokenBlock];
      for (int i = 0; i < n; ++i) slope[i] = entropy_grad(args.spec, weight[i]);
      store(slope, n, t, args.wide, args.entropy_grad_T);
    }
    add_block(args.spec, in, n, out, sums);
    sums.refused = sums.refused || refused(args.spec, in, n);
  }
}

void exp_values(double* values, int n) {
  for (int i = 0; i < n; ++i) values[i] = exp_of(values[i]);
}

void log_values(double* values, int n) {
  for (int i = 0; i < n; ++i) values[i] = log_of(values[i]);
}

}  // namespace
}  // namespace pyrl
