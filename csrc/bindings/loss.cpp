// The policy loss, on its own and in one go with the statistics of its rows.
#include <array>
#include <cstring>

#include "bindings/token_column.h"
#include "bindings/token_stats.h"
#include "loss/fused_loss.h"
#include "loss/policy_loss.h"

namespace pyrl::bindings {

using namespace logits;
using namespace logits::stats;
using namespace loss;

namespace {

TokenSpec spec_of(const std::vector<double>& numbers) {
  PYRL_CHECK(numbers.size() == static_cast<std::size_t>(kTokenSpecSize), "spec: expected ",
             kTokenSpecSize, " numbers, got ", numbers.size());
  TokenSpec spec;
  std::memcpy(&spec, numbers.data(), sizeof spec);
  return spec;
}

// With columns and responses set.
void set_kinds(PolicyLossArgs& args, const array<double>& weight_N, const std::vector<double>& spec,
               int scan, const std::vector<double>& position) {
  PYRL_CHECK(static_cast<std::size_t>(weight_N.size()) == args.responses.leaves,
             "weight_N: expected one weight per response, ", args.responses.leaves, ", got ",
             weight_N.size());
  args.weight_N = weight_N.data();
  args.spec = spec_of(spec);
  args.scan = static_cast<Scan>(scan);
  PYRL_CHECK((args.spec.ratio == static_cast<double>(RatioKind::given)) == (scan != 0),
             "scan: expected one for a ratio along a response and none for another, got ", scan);
  PYRL_CHECK(position.size() == 4, "position: expected 4 numbers, got ", position.size());
  args.position = {position[0], position[1], position[2], position[3]};
  args.wide = args.column[0].wide != nullptr;
}

py::tuple tuple_of(const PolicyLossTotals& totals) {
  return py::make_tuple(totals.loss, totals.weight, totals.clipped_low, totals.clipped_high,
                        totals.clipped_dual, totals.kl_old, totals.penalty, totals.ratio,
                        totals.ratio_max);
}

py::tuple loss(const std::vector<std::optional<py::array>>& columns, const MaskArray& mask_T,
               const array<std::int64_t>& offset_N1, const array<double>& weight_N,
               const std::vector<double>& spec, int scan, const std::vector<double>& position,
               std::optional<py::array> loss_T, std::optional<py::array> logprob_grad_T,
               std::optional<py::array> entropy_grad_T) {
  PYRL_CHECK(columns.size() == static_cast<std::size_t>(kTokenColumns) && columns[0],
             "columns: expected ", kTokenColumns, " of them, the first not None");
  const auto tokens = static_cast<std::size_t>(columns[0]->size());
  PolicyLossArgs args;
  args.responses = responses_of(tokens, mask_T, offset_N1);
  for (int c = 0; c < kTokenColumns; ++c)
    if (const auto& values = columns[static_cast<std::size_t>(c)])
      args.column[c] = column_of("columns[" + std::to_string(c) + "]", *values, tokens);
  set_kinds(args, weight_N, spec, scan, position);
  const auto output = [&](const char* name, std::optional<py::array>& values) -> void* {
    if (!values) return nullptr;
    const Column column = column_of(name, *values, tokens);
    PYRL_CHECK((column.wide != nullptr) == args.wide, name, ": expected the type of columns[0]");
    return values->mutable_data();
  };
  args.loss_T = output("loss_T", loss_T);
  args.logprob_grad_T = output("logprob_grad_T", logprob_grad_T);
  args.entropy_grad_T = output("entropy_grad_T", entropy_grad_T);
  PolicyLossTotals totals;
  {
    py::gil_scoped_release release;
    totals = policy_loss(args);
  }
  return tuple_of(totals);
}

// Addresses on the device.
py::tuple loss_cuda(std::int64_t tokens, const std::array<ColumnAddress, kTokenColumns>& columns,
                    std::uintptr_t mask, const array<std::int64_t>& offset_N1,
                    const array<double>& weight_N, const std::vector<double>& spec, int scan,
                    const std::vector<double>& position, std::uintptr_t loss,
                    std::uintptr_t logprob_grad, std::uintptr_t entropy_grad,
                    [[maybe_unused]] int device, [[maybe_unused]] std::uintptr_t stream) {
  PolicyLossArgs args;
  args.responses = responses_of(static_cast<std::size_t>(tokens), std::nullopt, offset_N1);
  args.responses.mask_T = pointer<const std::uint8_t>(mask);
  for (std::size_t c = 0; c < columns.size(); ++c) args.column[c] = column_at(columns[c]);
  set_kinds(args, weight_N, spec, scan, position);
  args.loss_T = pointer<void>(loss);
  args.logprob_grad_T = pointer<void>(logprob_grad);
  args.entropy_grad_T = pointer<void>(entropy_grad);
#ifdef PYRL_WITH_CUDA
  PolicyLossTotals totals;
  {
    py::gil_scoped_release release;
    totals = policy_loss_cuda(args, device, pointer<void>(stream));
  }
  return tuple_of(totals);
#else
  no_cuda_kernels("policy_loss");
#endif
}

}  // namespace

static void bind_policy_loss(py::module_& m) {
  m.def("policy_loss", &loss, "columns"_a, "mask_T"_a, "offset_N1"_a, "weight_N"_a, "spec"_a,
        "scan"_a, "position"_a, "loss_T"_a, "logprob_grad_T"_a, "entropy_grad_T"_a);
  m.def("policy_loss_cuda", &loss_cuda, "tokens"_a, "columns"_a, "mask"_a, "offset_N1"_a,
        "weight_N"_a, "spec"_a, "scan"_a, "position"_a, "loss"_a, "logprob_grad"_a,
        "entropy_grad"_a, "device"_a, "stream"_a);
}

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

void fused_loss_addresses(const LogitMatrix& logits, std::uintptr_t label,
                          const TokenStatsOptions& options,
                          const std::array<ColumnAddress, kTokenColumns>& columns,
                          const std::array<double, kTokenSpecSize>& spec, const py::dict& stats,
                          std::uintptr_t grad, std::int64_t grad_row_stride, int threads,
                          int device, std::uintptr_t stream) {
  FusedLossArgs args{};
  args.stats.logits_TV = logits;
  args.stats.label_T = pointer<const std::int64_t>(label);
  args.stats.options = options;
  set_columns(stats, args.stats.stat_T);
  std::memcpy(&args.spec, spec.data(), sizeof args.spec);
  PYRL_CHECK(args.spec.ratio != static_cast<double>(RatioKind::given),
             "spec: expected a ratio that is local to a token, got one along a response");
  for (std::size_t c = 0; c < columns.size(); ++c) args.columns.column[c] = column_at(columns[c]);
  args.grad_TV = pointer<void>(grad);
  args.grad_row_stride = grad_row_stride;
  const py::gil_scoped_release release;
  fused_loss_any(args, threads, device, stream);
}

}  // namespace

static void bind_fused_loss(py::module_& m) {
  m.def("fused_loss", &fused_loss_addresses, "logits"_a, "label"_a, "options"_a, "columns"_a,
        "spec"_a, "stats"_a, "grad"_a, "grad_row_stride"_a, "threads"_a, "device"_a, "stream"_a);
}

void bind_loss(py::module_& m) {
  bind_policy_loss(m);
  bind_fused_loss(m);
  bind_policy_terms(m);
}

}  // namespace pyrl::bindings
