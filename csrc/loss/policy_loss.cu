// One thread per token, whatever the loss is: its kinds are the same for all tokens, so that
// threads branch together. A block's sums, in a fixed order, are a part, and the parts are added in
// order: nothing is atomic, and the grid is a function of the number of tokens alone.
#include <climits>

#include "loss/device_scan.cuh"
#include "loss/policy_loss.h"
#include "loss/sums.h"

namespace pyrl::loss {
namespace device {
namespace {

// Two to a multiprocessor of an A100 or H100, which is what the registers of a thread allow.
constexpr std::int64_t kMostBlocks = 256;
constexpr std::int64_t kNone = INT64_MAX;

struct Sums {
  TokenSums<double> of;
  std::int64_t refused;  // the first such token, or kNone
};

// Along responses, by response_kernel; null where the loss has none.
struct AlongResponses {
  const double* log_ratio_T;
  const std::int64_t* position_T;
};

struct Token {
  const PolicyLossArgs& args;
  const AlongResponses& along;
  std::size_t t;
  double low, high, dual;  // with positions

  PYRL_HD bool by_position(TokenColumn name) const {
    if (along.position_T == nullptr) return false;
    return name == TokenColumn::low || name == TokenColumn::high || name == TokenColumn::dual;
  }
  PYRL_HD bool has(TokenColumn name) const {
    return by_position(name) || static_cast<bool>(args.column[static_cast<int>(name)]);
  }
  PYRL_HD double operator()(TokenColumn name) const {
    if (name == TokenColumn::log_ratio && along.log_ratio_T != nullptr) return along.log_ratio_T[t];
    if (!by_position(name)) return args.column[static_cast<int>(name)][t];
    if (name == TokenColumn::low) return low;
    return name == TokenColumn::high ? high : dual;
  }
};

__device__ void set_position_bounds(const PositionBounds& bounds, Token& token) {
  const double position = static_cast<double>(token.along.position_T[token.t] + 1);
  const double grown = pow(position, bounds.power);
  token.low = exp(-bounds.low * grown);
  token.high = exp(bounds.high * grown);
  token.dual = exp(bounds.dual * grown);
}

// The weight of the response that the token lies in; 0 outside the mask.
__device__ double weight_of(const PolicyLossArgs& args, std::int64_t t) {
  if (!args.responses.used(static_cast<std::size_t>(t))) return 0;
  std::size_t leaf = 0, stop = args.responses.leaves;  // offset_N1[leaf] <= t < offset_N1[stop]
  while (stop - leaf > 1) {
    const std::size_t middle = leaf + (stop - leaf) / 2;
    (args.responses.offset_N1[middle] <= t ? leaf : stop) = middle;
  }
  return args.weight_N[leaf];
}

__device__ void put(void* values, bool wide, std::size_t t, double value) {
  if (values == nullptr) return;
  if (wide) {
    static_cast<double*>(values)[t] = value;
  } else {
    static_cast<float*>(values)[t] = static_cast<float>(value);
  }
}

__device__ Sums no_sums() { return {{}, kNone}; }

__device__ Sums combine(const Sums& a, const Sums& b) {
  const TokenSums<double>&x = a.of, &y = b.of;
  return {{x.loss + y.loss, x.weight + y.weight, x.clipped_low + y.clipped_low,
           x.clipped_high + y.clipped_high, x.clipped_dual + y.clipped_dual, x.kl_old + y.kl_old,
           x.penalty + y.penalty, x.ratio + y.ratio, larger(x.ratio_max, y.ratio_max)},
          a.refused < b.refused ? a.refused : b.refused};
}

// All of the block's, in its first thread.
__device__ Sums block_sums(const Sums& own) {
  __shared__ Sums of_thread[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  of_thread[thread] = own;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) of_thread[thread] = combine(of_thread[thread], of_thread[thread + half]);
  }
  return of_thread[0];
}

__global__ void __launch_bounds__(kThreads)
    token_kernel(PolicyLossArgs args, AlongResponses along, Sums* part) {
  Token in = {args, along, 0, 0, 0, 0};
  const token::Kinds kinds = token::kinds_of(args.spec, in);
  Sums sums = no_sums();
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const auto tokens = static_cast<std::int64_t>(args.responses.tokens);
  for (std::int64_t t = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x; t < tokens;
       t += step) {
    in.t = static_cast<std::size_t>(t);
    if (along.position_T != nullptr) set_position_bounds(args.position, in);
    const double weight = weight_of(args, t), advantage = in(TokenColumn::advantage);
    const TokenTerm<double> term = token_term(kinds, args.spec, in, advantage, weight);
    put(args.loss_T, args.wide, in.t, term.loss);
    put(args.logprob_grad_T, args.wide, in.t, term.logprob_grad);
    put(args.entropy_grad_T, args.wide, in.t, entropy_grad(args.spec, weight));
    add(sums.of, term, kinds, args.spec, weight);
    if (sums.refused == kNone && refused(args.spec, in, advantage, weight)) sums.refused = t;
  }
  const Sums all = block_sums(sums);
  if (threadIdx.x == 0) part[blockIdx.x] = all;
}

// One block.
__global__ void __launch_bounds__(kThreads)
    total_kernel(const Sums* part, std::int64_t parts, Sums* total) {
  Sums sums = no_sums();
  for (std::int64_t p = threadIdx.x; p < parts; p += kThreads) sums = combine(sums, part[p]);
  const Sums all = block_sums(sums);
  if (threadIdx.x == 0) *total = all;
}

template <typename T>
void copy_async(T* to, const T* from, std::size_t count, cudaMemcpyKind kind, cudaStream_t queue) {
  check_cuda(cudaMemcpyAsync(to, from, count * sizeof(T), kind, queue), "copy");
}

// On the host; waits for the stream.
template <typename T>
T fetch(const T* from, cudaStream_t queue) {
  T value;
  copy_async(&value, from, 1, cudaMemcpyDeviceToHost, queue);
  check_cuda(cudaStreamSynchronize(queue), "policy_loss");
  return value;
}

double fetch(const Column& column, std::int64_t t, cudaStream_t queue) {
  return column.wide ? fetch(column.wide + t, queue) : fetch(column.narrow + t, queue);
}

[[noreturn]] void refuse(const PolicyLossArgs& args, std::int64_t t, cudaStream_t queue) {
  const auto at = [&](TokenColumn name) { return args.column[static_cast<int>(name)]; };
  const bool radii = at(TokenColumn::low) && at(TokenColumn::high);
  check_token(t, fetch(at(TokenColumn::advantage), t, queue),
              radii ? fetch(at(TokenColumn::low), t, queue) : 0,
              radii ? fetch(at(TokenColumn::high), t, queue) : 0);
  throw std::logic_error("policy_loss: a token was refused, but it is not wrong");
}

}  // namespace
}  // namespace device

PolicyLossTotals policy_loss_cuda(const PolicyLossArgs& on_host, int device, void* stream) {
  using namespace device;
  const auto tokens = static_cast<std::int64_t>(on_host.responses.tokens);
  const auto leaves = static_cast<std::int64_t>(on_host.responses.leaves);
  if (tokens == 0) return {};
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const std::int64_t blocks = std::min((tokens + kThreads - 1) / kThreads, kMostBlocks);
  const bool scans = on_host.scan != Scan::none, positions = on_host.position.power != 0;
  const StreamBuffer<std::int64_t> offset_N1(leaves + 1, queue);
  const StreamBuffer<double> weight_N(leaves, queue);
  const StreamBuffer<double> log_ratio_T(scans ? tokens : 0, queue);
  const StreamBuffer<std::int64_t> position_T(positions ? tokens : 0, queue);
  const StreamBuffer<Sums> part(blocks + 1, queue);
  PolicyLossArgs args = on_host;
  args.responses.offset_N1 = offset_N1.data();
  args.weight_N = weight_N.data();
  copy_async(offset_N1.data(), on_host.responses.offset_N1, on_host.responses.leaves + 1,
             cudaMemcpyHostToDevice, queue);
  copy_async(weight_N.data(), on_host.weight_N, on_host.responses.leaves, cudaMemcpyHostToDevice,
             queue);
  if (scans || positions) {
    launch(response_kernel, {leaves}, queue, args, log_ratio_T.data(), position_T.data());
  }
  const AlongResponses along = {log_ratio_T.data(), position_T.data()};
  launch(token_kernel, {blocks}, queue, args, along, part.data());
  launch(total_kernel, {1}, queue, part.data(), blocks, part.data() + blocks);
  const Sums sums = fetch(part.data() + blocks, queue);
  if (sums.refused != kNone) refuse(args, sums.refused, queue);
  const TokenSums<double>& of = sums.of;
  return {of.loss,   of.weight,  of.clipped_low, of.clipped_high, of.clipped_dual,
          of.kl_old, of.penalty, of.ratio,       of.ratio_max};
}

}  // namespace pyrl::loss
