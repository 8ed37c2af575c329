// What has a vocabulary axis: statistics and the draw. Tensors are addresses.
#include <array>

#include "base/random.h"
#include "bindings/bind.h"
#include "logits/sample/device_sample.h"
#include "logits/sample/sample_tokens.h"
#include "logits/stats/token_stats.h"

namespace pyrl::bindings {

using namespace logits;
using namespace logits::stats;
using namespace logits::sample;

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

static void bind_token_stats(py::module_& m) {
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

namespace {

py::tuple sample_tokens_arrays(std::uintptr_t data, int dtype, std::int64_t vocabulary,
                               std::int64_t row_stride, const array<std::uint64_t>& seed_B,
                               const array<std::int64_t>& position_B, double temperature,
                               std::int64_t top_k, double top_p, double min_p, int threads) {
  const std::int64_t rows = seed_B.size();
  array<std::int32_t> token_B(rows);
  array<float> logprob_B(rows), truncated_logprob_B(rows), entropy_B(rows), confidence_B(rows);
  const LogitMatrix logits_BV{pointer<const void>(data), static_cast<Dtype>(dtype), rows,
                              vocabulary, row_stride};
  const SampledTokens out{view_mutable(token_B), view_mutable(logprob_B),
                          view_mutable(truncated_logprob_B), view_mutable(entropy_B),
                          view_mutable(confidence_B)};
  {
    py::gil_scoped_release release;
    sample_tokens(logits_BV, view(seed_B), view(position_B), {temperature, top_k, top_p, min_p},
                  out, threads);
  }
  return py::make_tuple(token_B, logprob_B, truncated_logprob_B, entropy_B, confidence_B);
}

// Addresses on a CUDA device.
void sample_rows_addresses([[maybe_unused]] std::uintptr_t data, [[maybe_unused]] int dtype,
                           [[maybe_unused]] std::int64_t rows,
                           [[maybe_unused]] std::int64_t vocabulary,
                           [[maybe_unused]] std::int64_t row_stride,
                           [[maybe_unused]] std::uintptr_t uniform,
                           [[maybe_unused]] double temperature, [[maybe_unused]] std::int64_t top_k,
                           [[maybe_unused]] double top_p, [[maybe_unused]] double min_p,
                           [[maybe_unused]] std::uintptr_t out, [[maybe_unused]] int device,
                           [[maybe_unused]] std::uintptr_t stream) {
#ifdef PYRL_WITH_CUDA
  sample_rows_cuda(
      {{pointer<const void>(data), static_cast<Dtype>(dtype), rows, vocabulary, row_stride},
       pointer<const double>(uniform),
       temperature,
       top_k,
       top_p,
       min_p,
       pointer<double>(out)},
      device, pointer<void>(stream));
#else
  no_cuda_kernels("sample_rows");
#endif
}

array<double> uniforms_array(const array<std::uint64_t>& seed_B,
                             const array<std::int64_t>& position_B) {
  array<double> uniform_B(seed_B.size());
  uniforms(view(seed_B), view(position_B), view_mutable(uniform_B));
  return uniform_B;
}

}  // namespace

static void bind_sample_tokens(py::module_& m) {
  m.def("sample_tokens", &sample_tokens_arrays, "data"_a, "dtype"_a, "vocabulary"_a, "row_stride"_a,
        "seed_B"_a.noconvert(), "position_B"_a.noconvert(), "temperature"_a, "top_k"_a, "top_p"_a,
        "min_p"_a, "threads"_a);
  m.def("sample_rows", &sample_rows_addresses, "data"_a, "dtype"_a, "rows"_a, "vocabulary"_a,
        "row_stride"_a, "uniform"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "out"_a,
        "device"_a, "stream"_a, py::call_guard<py::gil_scoped_release>());
  m.def("uniforms", &uniforms_array, "seed_B"_a.noconvert(), "position_B"_a.noconvert());
}

void bind_logits(py::module_& m) {
  bind_token_stats(m);
  bind_sample_tokens(m);
}

}  // namespace pyrl::bindings
