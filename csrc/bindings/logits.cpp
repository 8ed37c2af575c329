// What has a vocabulary axis: statistics and the draw. Tensors are addresses.
#include "base/random.h"
#include "bindings/token_stats.h"
#include "logits/sample/device_sample.h"
#include "logits/sample/sample_tokens.h"

namespace pyrl::bindings {

using namespace logits;
using namespace logits::stats;
using namespace logits::sample;

namespace {

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

void token_stats_addresses(const LogitMatrix& logits, std::uintptr_t label,
                           const TokenStatsOptions& options, const py::dict& stats, int threads,
                           int device, std::uintptr_t stream) {
  TokenStatsArgs args{logits, pointer<const std::int64_t>(label), options, {}};
  set_columns(stats, args.stat_T);
  const py::gil_scoped_release release;
  token_stats_any(args, threads, device, stream);
}

void token_stats_grad_addresses(const LogitMatrix& logits, std::uintptr_t label,
                                const TokenStatsOptions& options, const py::dict& stats,
                                const py::dict& upstream, std::uintptr_t grad,
                                std::int64_t grad_row_stride, int threads, int device,
                                std::uintptr_t stream) {
  TokenStatsGradArgs args{
      logits,         pointer<const std::int64_t>(label), options, {}, {}, pointer<void>(grad),
      grad_row_stride};
  set_columns(stats, args.stat_T);
  set_columns(upstream, args.grad_T);
  const py::gil_scoped_release release;
  token_stats_grad_any(args, threads, device, stream);
}

}  // namespace

static void bind_token_stats(py::module_& m) {
  m.def("token_stats", &token_stats_addresses, "logits"_a, "label"_a, "options"_a, "stats"_a,
        "threads"_a, "device"_a, "stream"_a);
  m.def("token_stats_grad", &token_stats_grad_addresses, "logits"_a, "label"_a, "options"_a,
        "stats"_a, "upstream"_a, "grad"_a, "grad_row_stride"_a, "threads"_a, "device"_a,
        "stream"_a);
}

namespace {

py::tuple sample_tokens_arrays(const LogitMatrix& logits, const array<std::uint64_t>& seed_B,
                               const array<std::int64_t>& position_B, const Truncation& truncation,
                               const array<std::int32_t>& exclude_E,
                               const array<std::int64_t>& exclude_offset_B1, int threads) {
  array<std::int32_t> token_B(logits.rows);
  array<float> logprob_B(logits.rows), truncated_logprob_B(logits.rows), entropy_B(logits.rows),
      confidence_B(logits.rows), rest_logprob_B(logits.rows);
  const SampledTokens out{
      view_mutable(token_B),   view_mutable(logprob_B),    view_mutable(truncated_logprob_B),
      view_mutable(entropy_B), view_mutable(confidence_B), view_mutable(rest_logprob_B)};
  Excluded excluded;
  if (exclude_offset_B1.size() > 0) excluded = {exclude_E.data(), exclude_offset_B1.data()};
  {
    py::gil_scoped_release release;
    sample_tokens(logits, view(seed_B), view(position_B), truncation, excluded, out, threads);
  }
  return py::make_tuple(token_B, logprob_B, truncated_logprob_B, entropy_B, confidence_B,
                        rest_logprob_B);
}

// Addresses on a CUDA device.
void sample_rows_addresses([[maybe_unused]] const LogitMatrix& logits,
                           [[maybe_unused]] std::uintptr_t uniform,
                           [[maybe_unused]] const Truncation& truncation,
                           [[maybe_unused]] std::uintptr_t exclude,
                           [[maybe_unused]] std::uintptr_t exclude_offset,
                           [[maybe_unused]] std::uintptr_t out, [[maybe_unused]] int device,
                           [[maybe_unused]] std::uintptr_t stream) {
#ifdef PYRL_WITH_CUDA
  const Excluded excluded{pointer<const std::int32_t>(exclude),
                          pointer<const std::int64_t>(exclude_offset)};
  sample_rows_cuda(
      {logits, pointer<const double>(uniform), truncation, excluded, pointer<double>(out)}, device,
      pointer<void>(stream));
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
  m.def("sample_tokens", &sample_tokens_arrays, "logits"_a, "seed_B"_a.noconvert(),
        "position_B"_a.noconvert(), "truncation"_a, "exclude_E"_a.noconvert(),
        "exclude_offset_B1"_a.noconvert(), "threads"_a);
  m.def("sample_rows", &sample_rows_addresses, "logits"_a, "uniform"_a, "truncation"_a, "exclude"_a,
        "exclude_offset"_a, "out"_a, "device"_a, "stream"_a,
        py::call_guard<py::gil_scoped_release>());
  m.def("uniforms", &uniforms_array, "seed_B"_a.noconvert(), "position_B"_a.noconvert());
}

void bind_logit_records(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("float64", Dtype::float64)
      .value("float16", Dtype::float16)
      .value("bfloat16", Dtype::bfloat16);
  py::class_<LogitMatrix>(m, "LogitMatrix")
      .def(py::init([](std::uintptr_t data, Dtype dtype, std::int64_t rows, std::int64_t vocabulary,
                       std::int64_t row_stride) {
             return LogitMatrix{pointer<const void>(data), dtype, rows, vocabulary, row_stride};
           }),
           "data"_a, "dtype"_a, "rows"_a, "vocabulary"_a, "row_stride"_a);
  bind_options<TokenStatsOptions>(m, "TokenStatsOptions");
  bind_options<Truncation>(m, "Truncation");
}

void bind_logits(py::module_& m) {
  bind_token_stats(m);
  bind_sample_tokens(m);
}

}  // namespace pyrl::bindings
