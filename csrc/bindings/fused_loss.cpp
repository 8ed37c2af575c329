#include "loss/fused_loss.h"

#include <array>
#include <cstring>

#include "bindings/token_column.h"

namespace pyrl::bindings {

using namespace logits;
using namespace logits::stats;
using namespace loss;
namespace {

// device < 0: the CPU.
void fused_loss_any(const FusedLossArgs& args, int threads, int device,
                    [[maybe_unused]] std::uintptr_t stream) {
  if (device < 0) return fused_loss(args, threads);
#ifdef PYRL_WITH_CUDA
  fused_loss_cuda(args, device, pointer<void>(stream));
#else
  no_cuda_kernels("fused_loss");
#endif
}

void fused_loss_addresses(std::uintptr_t logits, int dtype, std::int64_t rows,
                          std::int64_t vocabulary, std::int64_t row_stride, std::uintptr_t label,
                          double temperature, double softcap,
                          const std::array<ColumnAddress, kTokenColumns>& columns,
                          const std::array<double, kTokenSpecSize>& spec, std::uintptr_t stats,
                          std::uintptr_t grad, std::int64_t grad_row_stride, int threads,
                          int device, std::uintptr_t stream) {
  FusedLossArgs args{};
  args.stats.logits_TV = {pointer<const void>(logits), static_cast<Dtype>(dtype), rows, vocabulary,
                          row_stride};
  args.stats.label_T = pointer<const std::int64_t>(label);
  args.stats.options.temperature = temperature;
  args.stats.options.softcap = softcap;
  double* row_T = pointer<double>(stats);
  for (const Stat stat : {Stat::logprob, Stat::entropy, Stat::logsumexp}) {
    args.stats.stat_T[static_cast<int>(stat)] = row_T;
    row_T += rows;
  }
  std::memcpy(&args.spec, spec.data(), sizeof args.spec);
  PYRL_CHECK(args.spec.ratio != static_cast<double>(RatioKind::given),
             "spec: expected a ratio that is local to a token, got one along a response");
  for (std::size_t c = 0; c < columns.size(); ++c) args.columns.column[c] = column_at(columns[c]);
  args.grad_TV = pointer<void>(grad);
  args.grad_row_stride = grad_row_stride;
  fused_loss_any(args, threads, device, stream);
}

}  // namespace

void bind_fused_loss(py::module_& m) {
  m.def("fused_loss", &fused_loss_addresses, "logits"_a, "dtype"_a, "rows"_a, "vocabulary"_a,
        "row_stride"_a, "label"_a, "temperature"_a, "softcap"_a, "columns"_a, "spec"_a, "stats"_a,
        "grad"_a, "grad_row_stride"_a, "threads"_a, "device"_a, "stream"_a,
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace pyrl::bindings
