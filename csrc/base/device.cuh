// What every kernel's host side needs: the caller's device, errors, launches, work space.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace pyrl::device {

inline constexpr int kThreads = 256;
inline constexpr int kWarp = 32;
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ T warp_sum(T value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}

template <typename T>
__device__ T warp_max(T value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA, ") + what + ": " + cudaGetErrorString(status));
}

// Makes a device current, and the caller's own again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "current device");
    if (device == before_) return;
    check_cuda(cudaSetDevice(device), "device of the tensors");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Work space that is there for the stream's kernels from here to the end of the scope; null if
// empty.
template <typename T>
class StreamBuffer {
 public:
  StreamBuffer(std::int64_t count, cudaStream_t stream) : stream_(stream) {
    if (count == 0) return;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    check_cuda(cudaMallocAsync(reinterpret_cast<void**>(&data_), bytes, stream), "work space");
  }
  ~StreamBuffer() {
    if (data_ != nullptr) static_cast<void>(cudaFreeAsync(data_, stream_));
  }
  StreamBuffer(const StreamBuffer&) = delete;
  StreamBuffer& operator=(const StreamBuffer&) = delete;

  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  cudaStream_t stream_;
};

struct Grid {
  std::int64_t rows;
  std::int64_t parts = 1;
  int threads = kThreads;
};

// kernel<<<rows x parts, threads, 0, stream>>>(arguments...)
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
            Arguments&&... arguments) {
  if (grid.rows > INT32_MAX || grid.parts > 65535) {
    throw std::invalid_argument("CUDA: expected fewer than 2^31 rows and columns, got a grid of " +
                                std::to_string(grid.rows) + " x " + std::to_string(grid.parts));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.rows), static_cast<unsigned>(grid.parts));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "launch");
}

}  // namespace pyrl::device
