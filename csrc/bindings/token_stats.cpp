#include "token_stats.h"

#include "bindings/bind.h"

namespace pyrl {
namespace {

LogitMatrix matrix(std::uintptr_t data, int dtype, std::int64_t rows, std::int64_t vocabulary,
                   std::int64_t row_stride) {
  return {reinterpret_cast<const void*>(data), static_cast<Dtype>(dtype), rows, vocabulary,
          row_stride};
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

#ifndef PYRL_WITH_CUDA
[[noreturn]] void no_cuda_kernels() {
  throw std::runtime_error(
      "token_stats: expected a build with CUDA kernels for a CUDA tensor, got one for the CPU "
      "only");
}
#endif

// device < 0: the CPU.
void token_stats_any(const TokenStatsArgs& args, int threads, int device,
                     [[maybe_unused]] std::uintptr_t stream) {
  if (device < 0) return token_stats(args, threads);
#ifdef PYRL_WITH_CUDA
  token_stats_cuda(args, device, pointer<void>(stream));
#else
  no_cuda_kernels();
#endif
}

void token_stats_grad_any(const TokenStatsGradArgs& args, int threads, int device,
                          [[maybe_unused]] std::uintptr_t stream) {
  if (device < 0) return token_stats_grad(args, threads);
#ifdef PYRL_WITH_CUDA
  token_stats_grad_cuda(args, device, pointer<void>(stream));
#else
  no_cuda_kernels();
#endif
}

}  // namespace

void bind_token_stats(py::module_& m) {
  m.def(
      "token_stats",
      [](std::uintptr_t logits, int dtype, std::int64_t rows, std::int64_t vocabulary,
         std::int64_t row_stride, std::uintptr_t label, double temperature, std::uintptr_t logprob,
         std::uintptr_t entropy, std::uintptr_t logsumexp, std::uintptr_t confidence, int threads,
         int device, std::uintptr_t stream) {
        token_stats_any(
            {matrix(logits, dtype, rows, vocabulary, row_stride),
             pointer<const std::int64_t>(label), temperature, pointer<double>(logprob),
             pointer<double>(entropy), pointer<double>(logsumexp), pointer<double>(confidence)},
            threads, device, stream);
      },
      "logits"_a, "dtype"_a, "rows"_a, "vocabulary"_a, "row_stride"_a, "label"_a, "temperature"_a,
      "logprob"_a, "entropy"_a, "logsumexp"_a, "confidence"_a, "threads"_a, "device"_a, "stream"_a,
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "token_stats_grad",
      [](std::uintptr_t logits, int dtype, std::int64_t rows, std::int64_t vocabulary,
         std::int64_t row_stride, std::uintptr_t label, double temperature, std::uintptr_t entropy,
         std::uintptr_t logsumexp, std::uintptr_t grad_logprob, std::uintptr_t grad_entropy,
         std::uintptr_t grad_logsumexp, std::uintptr_t grad, std::int64_t grad_row_stride,
         int threads, int device, std::uintptr_t stream) {
        token_stats_grad_any(
            {matrix(logits, dtype, rows, vocabulary, row_stride),
             pointer<const std::int64_t>(label), temperature, pointer<const double>(entropy),
             pointer<const double>(logsumexp), pointer<const double>(grad_logprob),
             pointer<const double>(grad_entropy), pointer<const double>(grad_logsumexp),
             pointer<void>(grad), grad_row_stride},
            threads, device, stream);
      },
      "logits"_a, "dtype"_a, "rows"_a, "vocabulary"_a, "row_stride"_a, "label"_a, "temperature"_a,
      "entropy"_a, "logsumexp"_a, "grad_logprob"_a, "grad_entropy"_a, "grad_logsumexp"_a, "grad"_a,
      "grad_row_stride"_a, "threads"_a, "device"_a, "stream"_a,
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace pyrl
