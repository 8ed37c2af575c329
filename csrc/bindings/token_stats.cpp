#include "logits/stats/token_stats.h"

#include <array>

#include "bindings/bind.h"

namespace pyrl::bindings {

using namespace logits;
using namespace logits::stats;
namespace {

LogitMatrix matrix(std::uintptr_t data, int dtype, std::int64_t rows, std::int64_t vocabulary,
                   std::int64_t row_stride) {
  return {pointer<const void>(data), static_cast<Dtype>(dtype), rows, vocabulary, row_stride};
}

// device < 0: the CPU.
void token_stats_any(const TokenStatsArgs& args, int threads, int device,
                     [[maybe_unused]] std::uintptr_t stream) {
  if (device < 0) return token_stats(args, threads);
#ifdef PYRL_WITH_CUDA
  token_stats_cuda(args, device, pointer<void>(stream));
#else
  no_cuda_kernels("token_stats");
#endif
}

void token_stats_grad_any(const TokenStatsGradArgs& args, int threads, int device,
                          [[maybe_unused]] std::uintptr_t stream) {
  if (device < 0) return token_stats_grad(args, threads);
#ifdef PYRL_WITH_CUDA
  token_stats_grad_cuda(args, device, pointer<void>(stream));
#else
  no_cuda_kernels("token_stats");
#endif
}

using Addresses = std::array<std::uintptr_t, kStats>;

void token_stats_addresses(std::uintptr_t logits, int dtype, std::int64_t rows,
                           std::int64_t vocabulary, std::int64_t row_stride, std::uintptr_t label,
                           double temperature, double softcap, int top_k, double kept_share,
                           double second_temperature, double nucleus, bool nucleus_crossing,
                           unsigned outputs, std::uintptr_t stats, int threads, int device,
                           std::uintptr_t stream) {
  TokenStatsArgs args{
      matrix(logits, dtype, rows, vocabulary, row_stride),
      pointer<const std::int64_t>(label),
      {temperature, softcap, top_k, kept_share, second_temperature, nucleus, nucleus_crossing},
      {}};
  double* row_T = pointer<double>(stats);
  for (int stat = 0; stat < kStats; ++stat) {
    if ((outputs >> stat & 1u) == 0) continue;
    args.stat_T[stat] = row_T;
    row_T += rows;
  }
  token_stats_any(args, threads, device, stream);
}

void token_stats_grad_addresses(std::uintptr_t logits, int dtype, std::int64_t rows,
                                std::int64_t vocabulary, std::int64_t row_stride,
                                std::uintptr_t label, double temperature, double softcap, int top_k,
                                double kept_share, double second_temperature, double nucleus,
                                bool nucleus_crossing, const Addresses& stat,
                                const Addresses& grad_stat, std::uintptr_t grad,
                                std::int64_t grad_row_stride, int threads, int device,
                                std::uintptr_t stream) {
  TokenStatsGradArgs args{
      matrix(logits, dtype, rows, vocabulary, row_stride),
      pointer<const std::int64_t>(label),
      {temperature, softcap, top_k, kept_share, second_temperature, nucleus, nucleus_crossing},
      {},
      {},
      pointer<void>(grad),
      grad_row_stride};
  for (std::size_t k = 0; k < stat.size(); ++k) {
    args.stat_T[k] = pointer<const double>(stat[k]);
    args.grad_T[k] = pointer<const double>(grad_stat[k]);
  }
  token_stats_grad_any(args, threads, device, stream);
}

}  // namespace

void bind_token_stats(py::module_& m) {
  m.def("token_stats", &token_stats_addresses, "logits"_a, "dtype"_a, "rows"_a, "vocabulary"_a,
        "row_stride"_a, "label"_a, "temperature"_a, "softcap"_a, "top_k"_a, "kept_share"_a,
        "second_temperature"_a, "nucleus"_a, "nucleus_crossing"_a, "outputs"_a, "stats"_a,
        "threads"_a, "device"_a, "stream"_a, py::call_guard<py::gil_scoped_release>());
  m.def("token_stats_grad", &token_stats_grad_addresses, "logits"_a, "dtype"_a, "rows"_a,
        "vocabulary"_a, "row_stride"_a, "label"_a, "temperature"_a, "softcap"_a, "top_k"_a,
        "kept_share"_a, "second_temperature"_a, "nucleus"_a, "nucleus_crossing"_a, "stat"_a,
        "grad_stat"_a, "grad"_a, "grad_row_stride"_a, "threads"_a, "device"_a, "stream"_a,
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace pyrl::bindings
