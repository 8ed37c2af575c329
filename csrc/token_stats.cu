// One block of threads per row. Each thread keeps shifted online sums of its columns; warps and
// then the block merge them in a fixed order, so that results do not vary from run to run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "token_stats.h"

namespace pyrl {
namespace {

constexpr int kTop = 5;  // confidence is the mass of this many
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr double kLn2 = 0.693147180559945309417;
constexpr double kLog2E = 1.44269504088896340736;

__device__ inline float widen(float z) { return z; }
__device__ inline double widen(double z) { return z; }
__device__ inline float widen(Float16 z) { return __half2float(__ushort_as_half(z.bits)); }
__device__ inline float widen(BFloat16 z) { return __bfloat162float(__ushort_as_bfloat16(z.bits)); }

__device__ inline void store(float value, float* out) { *out = value; }
__device__ inline void store(double value, double* out) { *out = value; }
__device__ inline void store(float value, Float16* out) {
  out->bits = __half_as_ushort(__float2half_rn(value));
}
__device__ inline void store(float value, BFloat16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

template <typename Element>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};

__device__ inline float base2(float t) { return exp2f(t); }
__device__ inline double base2(double t) { return exp2(t); }

// sum = sum_j 2^t_j, moment = sum_j t_j 2^t_j for t_j = (z_j - maximum) * scale. NaN and +inf in z
// make the sums NaN.
template <typename R>
struct Sums {
  R maximum = -INFINITY;
  R sum = 0;
  R moment = 0;

  __device__ void add(R z, R scale) {
    if (z == -INFINITY) return;
    if (z > maximum) {
      if (sum != 0) rescale(z, scale);
      maximum = z;
    }
    const R t = (z - maximum) * scale;
    const R weight = base2(t);
    sum += weight;
    if (weight != 0) moment += weight * t;
  }

  __device__ void merge(const Sums& other, R scale) {
    if (other.sum == 0) return;
    if (sum == 0) {
      *this = other;
      return;
    }
    Sums part = other;
    if (part.maximum > maximum) {
      rescale(part.maximum, scale);
    } else {
      part.rescale(maximum, scale);
    }
    sum += part.sum;
    moment += part.moment;
  }

  __device__ void rescale(R larger, R scale) {
    const R distance = (maximum - larger) * scale;
    const R factor = base2(distance);
    moment = factor == 0 ? 0 * moment : (moment + sum * distance) * factor;
    sum *= factor;
    maximum = larger;
  }
};

// The largest kTop elements seen by a thread, descending.
template <typename R>
struct Top {
  R value[kTop];

  __device__ Top() {
    for (int k = 0; k < kTop; ++k) value[k] = -INFINITY;
  }

  __device__ void add(R z) {
    if (!(z > value[kTop - 1])) return;
    value[kTop - 1] = z;
#pragma unroll
    for (int k = kTop - 1; k > 0; --k) {
      if (value[k] > value[k - 1]) {
        const R smaller = value[k - 1];
        value[k - 1] = value[k];
        value[k] = smaller;
      }
    }
  }

  __device__ void pop() {
#pragma unroll
    for (int k = 0; k + 1 < kTop; ++k) value[k] = value[k + 1];
    value[kTop - 1] = -INFINITY;
  }
};

// Valid in thread 0; every thread of the block calls it.
__device__ Sums<double> merge_block(Sums<double> sums, double scale) {
  __shared__ double maximum_of_warp[kWarps], sum_of_warp[kWarps], moment_of_warp[kWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    Sums<double> other;
    other.maximum = __shfl_down_sync(kAllLanes, sums.maximum, offset);
    other.sum = __shfl_down_sync(kAllLanes, sums.sum, offset);
    other.moment = __shfl_down_sync(kAllLanes, sums.moment, offset);
    sums.merge(other, scale);
  }
  if (threadIdx.x % kWarp == 0) {
    maximum_of_warp[threadIdx.x / kWarp] = sums.maximum;
    sum_of_warp[threadIdx.x / kWarp] = sums.sum;
    moment_of_warp[threadIdx.x / kWarp] = sums.moment;
  }
  __syncthreads();
  if (threadIdx.x != 0) return sums;
  for (int warp = 1; warp < kWarps; ++warp) {
    Sums<double> other;
    other.maximum = maximum_of_warp[warp];
    other.sum = sum_of_warp[warp];
    other.moment = moment_of_warp[warp];
    sums.merge(other, scale);
  }
  return sums;
}

// Removes the block's largest remaining element and returns it, in every thread; of equal ones the
// lowest thread gives its own.
template <typename R>
__device__ R pop_largest(Top<R>& top) {
  __shared__ R value_of_warp[kWarps];
  __shared__ int thread_of_warp[kWarps];
  R value = top.value[0];
  int thread = threadIdx.x;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const R other = __shfl_down_sync(kAllLanes, value, offset);
    const int other_thread = __shfl_down_sync(kAllLanes, thread, offset);
    if (other > value) {
      value = other;
      thread = other_thread;
    }
  }
  if (threadIdx.x % kWarp == 0) {
    value_of_warp[threadIdx.x / kWarp] = value;
    thread_of_warp[threadIdx.x / kWarp] = thread;
  }
  __syncthreads();
  value = value_of_warp[0];
  thread = thread_of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) {
    if (value_of_warp[warp] > value) {
      value = value_of_warp[warp];
      thread = thread_of_warp[warp];
    }
  }
  if (static_cast<int>(threadIdx.x) == thread) top.pop();
  __syncthreads();
  return value;
}

__device__ void write(const TokenStatsArgs& args, std::int64_t t, double logprob, double entropy,
                      double logsumexp, double confidence) {
  const double value[] = {logprob, entropy, logsumexp, confidence};
  const Stat stat[] = {Stat::logprob, Stat::entropy, Stat::logsumexp, Stat::confidence};
  for (int k = 0; k < 4; ++k) {
    double* out_T = args.stat_T[static_cast<int>(stat[k])];
    if (out_T != nullptr) out_T[t] = value[k];
  }
}

__device__ bool inside(std::int64_t label, const LogitMatrix& logits_TV) {
  return label >= 0 && label < logits_TV.vocabulary;
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) stats_kernel(TokenStatsArgs args, double scale) {
  using R = typename RealOf<Element>::type;
  const std::int64_t t = blockIdx.x;
  const std::int64_t label = args.label_T[t];
  if (label == kIgnoredLabel || !inside(label, args.logits_TV)) {
    const double value = label == kIgnoredLabel ? 0.0 : NAN;
    if (threadIdx.x == 0) write(args, t, value, value, value, value);
    return;
  }
  const Element* z =
      static_cast<const Element*>(args.logits_TV.data) + t * args.logits_TV.row_stride;
  Sums<R> own;
  Top<R> top;
  for (std::int64_t v = threadIdx.x; v < args.logits_TV.vocabulary; v += kThreads) {
    const R value = widen(z[v]);
    own.add(value, static_cast<R>(scale));
    top.add(value);
  }
  Sums<double> sums;
  sums.maximum = own.maximum;
  sums.sum = own.sum;
  sums.moment = own.moment;
  sums = merge_block(sums, scale);
  double mass = 0;
  for (int k = 0; k < kTop; ++k) {
    const double value = pop_largest(top);
    mass += exp2((value - sums.maximum) * scale);  // -inf beyond the vocabulary adds 0
  }
  if (threadIdx.x != 0) return;
  if (sums.sum == 0) return write(args, t, -INFINITY, 0, -INFINITY, 0);
  if (isnan(sums.sum)) return write(args, t, NAN, NAN, NAN, NAN);
  const double z_label = widen(z[label]);
  write(args, t, (z_label - sums.maximum) / args.options.temperature - log(sums.sum),
        fmax(0.0, (log2(sums.sum) - sums.moment / sums.sum) * kLn2),
        sums.maximum / args.options.temperature + log(sums.sum), fmin(1.0, mass / sums.sum));
}

__device__ double upstream(const TokenStatsGradArgs& args, Stat stat, std::int64_t t) {
  const double* grad_T = args.grad_T[static_cast<int>(stat)];
  return grad_T == nullptr ? 0 : grad_T[t];
}

// The same split of the gradient as in token_stats.cpp.
__device__ double label_gradient(const TokenStatsGradArgs& args, std::int64_t t, double z) {
  const double logprob =
      z / args.options.temperature - args.stat_T[static_cast<int>(Stat::logsumexp)][t];
  const double p = exp(logprob);
  const double spread =
      p == 0 ? 0 : p * (logprob + args.stat_T[static_cast<int>(Stat::entropy)][t]);
  return (upstream(args, Stat::logsumexp, t) * p -
          upstream(args, Stat::logprob, t) * expm1(logprob) -
          upstream(args, Stat::entropy, t) * spread) /
         args.options.temperature;
}

template <typename Element>
__device__ void fill(typename RealOf<Element>::type value, std::int64_t n, Element* out) {
  for (std::int64_t v = threadIdx.x; v < n; v += kThreads) store(value, out + v);
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) grad_kernel(TokenStatsGradArgs args, double scale) {
  using R = typename RealOf<Element>::type;
  const std::int64_t t = blockIdx.x;
  const std::int64_t vocabulary = args.logits_TV.vocabulary;
  const std::int64_t label = args.label_T[t];
  const double logsumexp = args.stat_T[static_cast<int>(Stat::logsumexp)][t];
  Element* dz = static_cast<Element*>(args.grad_TV) + t * args.grad_row_stride;
  if (label == kIgnoredLabel || logsumexp == -INFINITY) return fill(R(0), vocabulary, dz);
  if (!inside(label, args.logits_TV) || isnan(logsumexp)) return fill(R(NAN), vocabulary, dz);
  const Element* z =
      static_cast<const Element*>(args.logits_TV.data) + t * args.logits_TV.row_stride;
  const double shift = logsumexp * args.options.temperature;
  const double gradient_of_all =
      upstream(args, Stat::logsumexp, t) - upstream(args, Stat::logprob, t) -
      upstream(args, Stat::entropy, t) * args.stat_T[static_cast<int>(Stat::entropy)][t];
  const R near = static_cast<R>(shift);
  const R rest = static_cast<R>(shift - static_cast<double>(near));
  const R constant = static_cast<R>(gradient_of_all / args.options.temperature);
  const R slope =
      static_cast<R>(-upstream(args, Stat::entropy, t) * kLn2 / args.options.temperature);
  for (std::int64_t v = threadIdx.x; v < vocabulary; v += kThreads) {
    const R value = widen(z[v]);
    const R exponent = ((value - near) - rest) * static_cast<R>(scale);
    const R weight = base2(exponent);
    R gradient = weight == 0 ? R(0) : weight * (constant + slope * exponent);
    if (v == label) gradient = static_cast<R>(label_gradient(args, t, value));
    store(gradient, dz + v);
  }
}

// One block of threads per row.
unsigned grid(const LogitMatrix& logits_TV) {
  if (logits_TV.rows > INT32_MAX) {
    throw std::invalid_argument("logits_TV: expected fewer than 2^31 rows, got " +
                                std::to_string(logits_TV.rows));
  }
  return static_cast<unsigned>(logits_TV.rows);
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("token_stats: ") + what + ": " + cudaGetErrorString(status));
}

// What these kernels know of.
void check_options(const TokenStatsOptions& options, bool confidence) {
  if (options.softcap != 0 || (confidence && options.top_k != kTop)) {
    throw std::invalid_argument("token_stats: expected softcap = 0 and top_k = 5 on CUDA");
  }
}

template <typename Pointer>
void check_columns(const Pointer* column_of_stat) {
  for (int k = static_cast<int>(Stat::self_certainty); k < kStats; ++k) {
    if (k == static_cast<int>(Stat::confidence) || column_of_stat[k] == nullptr) continue;
    throw std::invalid_argument(
        "token_stats: expected logprob, entropy, logsumexp and confidence alone on CUDA");
  }
}

}  // namespace

void token_stats_cuda(const TokenStatsArgs& args, int device, void* stream) {
  check_options(args.options, args.stat_T[static_cast<int>(Stat::confidence)] != nullptr);
  check_columns(args.stat_T);
  if (args.logits_TV.rows == 0) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  with_elements(args.logits_TV, [&](const auto* z) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(z)>>;
    stats_kernel<Element><<<grid(args.logits_TV), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        args, kLog2E / args.options.temperature);
  });
  check(cudaGetLastError(), "forward kernel");
}

void token_stats_grad_cuda(const TokenStatsGradArgs& args, int device, void* stream) {
  check_options(args.options, false);
  check_columns(args.grad_T);
  if (args.logits_TV.rows == 0) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  with_elements(args.logits_TV, [&](const auto* z) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(z)>>;
    grad_kernel<Element><<<grid(args.logits_TV), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        args, kLog2E / args.options.temperature);
  });
  check(cudaGetLastError(), "backward kernel");
}

}  // namespace pyrl
