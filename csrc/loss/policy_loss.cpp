#include "loss/policy_loss.h"

#include <cmath>
#include <vector>

#include "loss/kernels.h"

namespace pyrl::loss {
namespace {

constexpr std::size_t kChunk = 1024;  // tokens that are scanned at a time, in whole responses

// exp(base t^power) for t = 1 to n.
std::vector<double> position_bound(double base, double power, std::int64_t n) {
  std::vector<double> bound(static_cast<std::size_t>(n));
  for (std::int64_t t = 1; t <= n; ++t)
    bound[static_cast<std::size_t>(t - 1)] =
        std::exp(base * std::pow(static_cast<double>(t), power));
  return bound;
}

std::int64_t longest(const Responses& responses) {
  std::int64_t most = 0;
  for (std::size_t leaf = 0; leaf < responses.leaves; ++leaf)
    most = std::max(most, responses.offset_N1[leaf + 1] - responses.offset_N1[leaf]);
  return most;
}

// Calls visit(first, last) with responses of at least kChunk tokens together.
template <typename Visit>
void for_responses(const Responses& responses, Visit visit) {
  for (std::size_t first = 0, last = 0; first < responses.leaves; first = last) {
    const std::int64_t stop = responses.offset_N1[first] + static_cast<std::int64_t>(kChunk);
    do ++last;
    while (last < responses.leaves && responses.offset_N1[last] < stop);
    visit(first, last);
  }
}

[[noreturn]] void refuse(const PolicyLossArgs& args) {
  const auto at = [&](TokenColumn name) { return args.column[static_cast<int>(name)]; };
  std::size_t leaf = 0;
  for (std::size_t t = 0; t < args.responses.tokens; ++t) {
    while (args.responses.offset_N1[leaf + 1] <= static_cast<std::int64_t>(t)) ++leaf;
    if (!args.responses.used(t) || args.weight_N[leaf] == 0) continue;
    const bool radii = at(TokenColumn::low) && at(TokenColumn::high);
    check_token(static_cast<std::int64_t>(t), at(TokenColumn::advantage)[t],
                radii ? at(TokenColumn::low)[t] : 0, radii ? at(TokenColumn::high)[t] : 0);
  }
  throw std::logic_error("policy_loss: a token was refused, but none is wrong");
}

PolicyLossTotals totals_of(const PolicySums& sums) {
  PolicyLossTotals totals{total(sums.loss),         total(sums.weight),
                          total(sums.clipped_low),  total(sums.clipped_high),
                          total(sums.clipped_dual), total(sums.kl_old),
                          total(sums.penalty),      total(sums.ratio)};
  for (const double ratio : sums.ratio_max.lane)
    totals.ratio_max = std::max(totals.ratio_max, ratio);
  return totals;
}

}  // namespace

PolicyLossTotals policy_loss(const PolicyLossArgs& args) {
  const auto blocks = policy_kernels().blocks;
  const auto at = [&](TokenColumn name) { return args.column[static_cast<int>(name)]; };
  std::vector<double> low, high, dual, log_ratio;
  if (args.position.power != 0) {
    const std::int64_t n = longest(args.responses);
    low = position_bound(-args.position.low, args.position.power, n);
    high = position_bound(args.position.high, args.position.power, n);
    dual = position_bound(args.position.dual, args.position.power, n);
  }
  PolicyChunk chunk{&args, 0, args.responses.tokens, 0, nullptr, nullptr, nullptr, nullptr};
  if (!low.empty()) chunk.low = low.data(), chunk.high = high.data(), chunk.dual = dual.data();
  PolicySums sums;
  if (args.scan == Scan::none) {
    blocks(chunk, sums);
  } else {
    for_responses(args.responses, [&](std::size_t first, std::size_t last) {
      chunk.begin = static_cast<std::size_t>(args.responses.offset_N1[first]);
      chunk.end = static_cast<std::size_t>(args.responses.offset_N1[last]);
      chunk.leaf = first;
      // And what the last eight tokens read beyond.
      log_ratio.resize(std::max(log_ratio.size(), chunk.end - chunk.begin + kLanes));
      chunk.log_ratio = log_ratio.data();
      policy_kernels().scan(
          {args.scan, args.spec.pre_clip, at(TokenColumn::logprob), at(TokenColumn::anchor),
           at(TokenColumn::advantage), &args.responses, first, last},
          log_ratio.data());
      blocks(chunk, sums);
    });
  }
  if (sums.refused) refuse(args);
  return totals_of(sums);
}

}  // namespace pyrl::loss
