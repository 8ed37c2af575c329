#include "policy_loss.h"

#include "bindings/token_column.h"

namespace pyrl {
namespace {

TokenSpec spec_of(const std::vector<double>& numbers) {
  PYRL_CHECK(numbers.size() == static_cast<std::size_t>(kTokenSpecSize), "spec: expected ",
             kTokenSpecSize, " numbers, got ", numbers.size());
  TokenSpec spec;
  std::memcpy(&spec, numbers.data(), sizeof spec);
  return spec;
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
  args.segments = segments_of(tokens, mask_T, offset_N1);
  for (int c = 0; c < kTokenColumns; ++c)
    if (const auto& values = columns[static_cast<std::size_t>(c)])
      args.column[c] = column_of("columns[" + std::to_string(c) + "]", *values, tokens);
  PYRL_CHECK(weight_N.size() + 1 == offset_N1.size(),
             "weight_N: expected one weight per response, ", args.segments.leaves, ", got ",
             weight_N.size());
  args.weight_N = weight_N.data();
  args.spec = spec_of(spec);
  args.scan = static_cast<Scan>(scan);
  PYRL_CHECK(position.size() == 4, "position: expected 4 numbers, got ", position.size());
  args.position = {position[0], position[1], position[2], position[3]};
  args.wide = args.column[0].wide != nullptr;
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
  return py::make_tuple(totals.loss, totals.weight, totals.clipped_low, totals.clipped_high,
                        totals.clipped_dual, totals.kl_old, totals.penalty, totals.ratio,
                        totals.ratio_max);
}

}  // namespace

void bind_policy_loss(py::module_& m) {
  m.def("policy_loss", &loss, "columns"_a, "mask_T"_a, "offset_N1"_a, "weight_N"_a, "spec"_a,
        "scan"_a, "position"_a, "loss_T"_a, "logprob_grad_T"_a, "entropy_grad_T"_a);
}

}  // namespace pyrl
