// Kernels with one fault each, which the emulation must notice.
#include "faulty.h"

#include "cuda_runtime.h"

namespace cuda_on_cpu {
namespace {

// Sums 0 ... 63 through shared memory; without the barrier a thread may come before the writers.
template <bool kBarrier>
__global__ void sum_kernel(double* sum) {
  __shared__ double value[64];
  value[threadIdx.x] = threadIdx.x;
  if (kBarrier) __syncthreads();
  double own = 0;
  for (int i = 0; i < 64; ++i) own += value[i];
  if (threadIdx.x == 17) *sum = own;
}

__global__ void unwritten_kernel(double* sum) {
  __shared__ double value[64];
  if (threadIdx.x != 5) value[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) *sum = value[5];
}

__global__ void divergent_kernel(double* sum) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  *sum = 0;
}

__global__ void early_exit_kernel(double* sum) {
  if (threadIdx.x == 3) return;
  *sum = __shfl_xor_sync(0xffffffffu, 1.0, 1);
}

}  // namespace

double run_faulty(const std::string& name) {
  void (*kernel)(double*) = name == "sum"               ? sum_kernel<true>
                            : name == "missing barrier" ? sum_kernel<false>
                            : name == "unwritten"       ? unwritten_kernel
                            : name == "divergent"       ? divergent_kernel
                                                        : early_exit_kernel;
  double result = 0;
  cudaLaunchConfig_t config;
  config.blockDim = dim3(64);
  cudaLaunchKernelEx(&config, kernel, &result);
  return result;
}

}  // namespace cuda_on_cpu
