// CUDA on the CPU, for tests: g++ compiles csrc/*.cu as C++ with this folder before CUDA's own.
//
// A block's threads are fibers. A fiber runs until __syncthreads or a warp shuffle, then another
// runs; which one is next is shuffled by a seed, so results that change with the seed betray a
// missing barrier. Barriers that not every thread reaches, or that threads reach at different
// lines, make the launch fail, and shared memory starts as NaN in every block. Blocks run one after
// another, streams are ignored. Built with -fsanitize=address,undefined, reads out of bounds of the
// caller's arrays and misaligned vector loads are found as well. What it cannot show: speed, the
// memory model between blocks, the compiler's own faults.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time, so one copy serves all; thread_local gathers them in one segment, which
// Block::run fills with NaN.
#define __shared__ static thread_local

using cuda_on_cpu::dim3;
using cuda_on_cpu::uint3;
using cuda_on_cpu::uint4;

inline const uint3& threadIdx = cuda_on_cpu::block().thread;
inline const uint3& blockIdx = cuda_on_cpu::block().index;
inline const dim3& blockDim = cuda_on_cpu::block().size;
inline const dim3& gridDim = cuda_on_cpu::block().grid;

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::block().wait(line); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  const int lane = static_cast<int>(threadIdx.x) % cuda_on_cpu::kWarp;
  return cuda_on_cpu::block().shuffle(mask, value, lane ^ lanes, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int line = __builtin_LINE()) {
  const int lane = static_cast<int>(threadIdx.x) % cuda_on_cpu::kWarp;
  const int from = lane + static_cast<int>(lanes);
  return cuda_on_cpu::block().shuffle(mask, value, from < cuda_on_cpu::kWarp ? from : lane, line);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int line = __builtin_LINE()) {
  const int lane = static_cast<int>(threadIdx.x) % cuda_on_cpu::kWarp;
  const int from = lane - static_cast<int>(lanes);
  return cuda_on_cpu::block().shuffle(mask, value, from >= 0 ? from : lane, line);
}

// ---- the runtime's host functions, as far as csrc/ calls them ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101, cudaErrorMemoryAllocation = 2 };
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "an error of the emulation";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::current_device();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return cuda_on_cpu::set_current_device(device) ? cudaSuccess : cudaErrorInvalidDevice;
}

// Filled with NaN: what a kernel reads without having written is seen.
inline cudaError_t cudaMallocAsync(void** data, std::size_t bytes, cudaStream_t) {
  *data = std::malloc(bytes);
  if (*data == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*data, 0xff, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* data, cudaStream_t) { return std::free(data), cudaSuccess; }

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  cuda_on_cpu::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
