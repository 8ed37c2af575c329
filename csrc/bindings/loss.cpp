// The policy loss, by itself and in one go with the statistics of its rows. Columns of a number per
// token, float32 or float64, are read where they lie; nothing is copied.
#include <pybind11/native_enum.h>

#include <algorithm>
#include <array>

#include "bindings/token_stats.h"
#include "loss/fused_loss.h"
#include "loss/policy_loss.h"

namespace pyrl::bindings {

using namespace logits;
using namespace logits::stats;
using namespace loss;

namespace {

// -- records --

void bind_kinds(py::module_& m) {
  constexpr const char* kIntEnum = "enum.IntEnum";
  py::native_enum<TokenColumn>(m, "TokenColumn", kIntEnum)
      .value("logprob", TokenColumn::logprob)
      .value("entropy", TokenColumn::entropy)
      .value("anchor", TokenColumn::anchor)
      .value("trust", TokenColumn::trust)
      .value("log_ratio", TokenColumn::log_ratio)
      .value("advantage", TokenColumn::advantage)
      .value("weight", TokenColumn::weight)
      .value("low", TokenColumn::low)
      .value("high", TokenColumn::high)
      .value("dual", TokenColumn::dual)
      .value("factor", TokenColumn::factor)
      .value("heat", TokenColumn::heat)
      .value("addend", TokenColumn::addend)
      .value("target_0", TokenColumn::target_0)
      .value("target_1", TokenColumn::target_1)
      .value("target_2", TokenColumn::target_2)
      .value("scale_0", TokenColumn::scale_0)
      .value("scale_1", TokenColumn::scale_1)
      .value("scale_2", TokenColumn::scale_2)
      .finalize();
  py::native_enum<RatioKind>(m, "RatioKind", kIntEnum)
      .value("one", RatioKind::one)
      .value("token", RatioKind::token)
      .value("given", RatioKind::given)
      .finalize();
  py::native_enum<BoundsKind>(m, "BoundsKind", kIntEnum)
      .value("none", BoundsKind::none)
      .value("radius", BoundsKind::radius)
      .value("range", BoundsKind::range)
      .value("total_variation", BoundsKind::total_variation)
      .value("binary_kl", BoundsKind::binary_kl)
      .finalize();
  py::native_enum<SurrogateKind>(m, "SurrogateKind", kIntEnum)
      .value("ppo", SurrogateKind::ppo)
      .value("mask_logp", SurrogateKind::mask_logp)
      .value("clamp_logp", SurrogateKind::clamp_logp)
      .value("gppo", SurrogateKind::gppo)
      .value("sigmoid", SurrogateKind::sigmoid)
      .finalize();
  py::native_enum<PenaltyKind>(m, "PenaltyKind", kIntEnum)
      .value("none", PenaltyKind::none)
      .value("k1", PenaltyKind::k1)
      .value("abs", PenaltyKind::abs)
      .value("k2", PenaltyKind::k2)
      .value("k3", PenaltyKind::k3)
      .value("k1_plus", PenaltyKind::k1_plus)
      .value("k3_plus", PenaltyKind::k3_plus)
      .value("leaky", PenaltyKind::leaky)
      .finalize();
  py::native_enum<Scan>(m, "Scan", kIntEnum)
      .value("none", Scan::none)
      .value("seq_geo", Scan::seq_geo)
      .value("seq_prod", Scan::seq_prod)
      .value("cum_prod", Scan::cum_prod)
      .value("cum_geo", Scan::cum_geo)
      .value("min_prefix", Scan::min_prefix)
      .finalize();
}

// An array of a record, as a tuple.
template <typename Record, typename T, std::size_t n>
auto get_each(T (Record::*field)[n]) {
  return [field](const Record& record) {
    std::array<T, n> values;
    std::copy_n(record.*field, n, values.begin());
    return py::tuple(py::cast(values));
  };
}

template <typename Record, typename T, std::size_t n>
auto set_each(T (Record::*field)[n]) {
  return [field](Record& record, const std::array<T, n>& values) {
    std::copy_n(values.begin(), n, record.*field);
  };
}

void bind_spec(py::module_& m) {
  py::class_<TokenSpec>(m, "TokenSpec")
      .def(py::init([] { return TokenSpec{}; }))
      .def_readwrite("ratio", &TokenSpec::ratio)
      .def_readwrite("log_ratio_low", &TokenSpec::log_ratio_low)
      .def_readwrite("log_ratio_high", &TokenSpec::log_ratio_high)
      .def_readwrite("pre_clip", &TokenSpec::pre_clip)
      .def_readwrite("bounds", &TokenSpec::bounds)
      .def_readwrite("low", &TokenSpec::low)
      .def_readwrite("high", &TokenSpec::high)
      .def_readwrite("widen", &TokenSpec::widen)
      .def_readwrite("trust", &TokenSpec::trust)
      .def_readwrite("surrogate", &TokenSpec::surrogate)
      .def_readwrite("cap", &TokenSpec::cap)
      .def_readwrite("outer_low", &TokenSpec::outer_low)
      .def_readwrite("outer_high", &TokenSpec::outer_high)
      .def_readwrite("outer_value", &TokenSpec::outer_value)
      .def_readwrite("tau_positive", &TokenSpec::tau_positive)
      .def_readwrite("tau_other", &TokenSpec::tau_other)
      .def_readwrite("dual", &TokenSpec::dual)
      .def_readwrite("redistribute", &TokenSpec::redistribute)
      .def_property("penalty", get_each(&TokenSpec::penalty), set_each(&TokenSpec::penalty))
      .def_property("penalty_coef", get_each(&TokenSpec::penalty_coef),
                    set_each(&TokenSpec::penalty_coef))
      .def_readwrite("leak", &TokenSpec::leak)
      .def_readwrite("entropy_coef", &TokenSpec::entropy_coef);
  py::class_<PositionBounds>(m, "PositionBounds")
      .def(py::init<>())
      .def_readwrite("power", &PositionBounds::power)
      .def_readwrite("low", &PositionBounds::low)
      .def_readwrite("high", &PositionBounds::high)
      .def_readwrite("dual", &PositionBounds::dual);
  py::class_<PolicyLossTotals>(m, "PolicyLossTotals")
      .def_readonly("loss", &PolicyLossTotals::loss)
      .def_readonly("weight", &PolicyLossTotals::weight)
      .def_readonly("clipped_low", &PolicyLossTotals::clipped_low)
      .def_readonly("clipped_high", &PolicyLossTotals::clipped_high)
      .def_readonly("clipped_dual", &PolicyLossTotals::clipped_dual)
      .def_readonly("kl_old", &PolicyLossTotals::kl_old)
      .def_readonly("penalty", &PolicyLossTotals::penalty)
      .def_readonly("ratio", &PolicyLossTotals::ratio)
      .def_readonly("ratio_max", &PolicyLossTotals::ratio_max);
}

// -- arguments --

Column column_of(const std::string& name, const py::array& values, std::size_t tokens) {
  const bool narrow = py::isinstance<py::array_t<float>>(values);
  const bool wide = py::isinstance<py::array_t<double>>(values);
  PYRL_CHECK(narrow || wide, name, ": expected float32 or float64, got ",
             std::string(py::str(static_cast<const py::object&>(values.dtype()))));
  PYRL_CHECK(values.ndim() == 1 && static_cast<std::size_t>(values.size()) == tokens, name,
             ": expected ", tokens, " entries, got ", values.size(), " in ", values.ndim(),
             " axes");
  PYRL_CHECK(values.flags() & py::array::c_style, name,
             ": expected a contiguous array, got strides of ", values.strides(0), " bytes");
  Column column;
  if (narrow) column.narrow = static_cast<const float*>(values.data());
  if (wide) column.wide = static_cast<const double*>(values.data());
  return column;
}

// A tensor's column: its address, and the bytes of a number, 4 or 8; {0, 0} for none.
using ColumnAddress = std::pair<std::uintptr_t, int>;

Column column_at(const ColumnAddress& column) {
  const auto [address, size] = column;
  Column found;
  if (size == 4) found.narrow = pointer<const float>(address);
  if (size == 8) found.wide = pointer<const double>(address);
  return found;
}

// Without the mask.
Responses responses_of(std::size_t tokens, const array<std::int64_t>& offset_N1) {
  const std::int64_t* offset = offset_N1.data();
  const auto leaves = offset_N1.size() - 1;
  PYRL_CHECK(leaves >= 0, "offset_N1: expected offsets from 0 to ", tokens, ", got none");
  PYRL_CHECK(offset[0] == 0 && offset[leaves] == static_cast<std::int64_t>(tokens),
             "offset_N1: expected offsets from 0 to ", tokens, ", got ", offset[0], " to ",
             offset[leaves]);
  for (py::ssize_t leaf = 0; leaf < leaves; ++leaf)
    PYRL_CHECK(offset[leaf] <= offset[leaf + 1],
               "offset_N1: expected offsets that do not fall, got ", offset[leaf], " before ",
               offset[leaf + 1]);
  return {tokens, nullptr, offset, static_cast<std::size_t>(leaves)};
}

// What a loss is, with columns and responses set.
void set_loss(PolicyLossArgs& args, const array<double>& weight_N, const TokenSpec& spec, Scan scan,
              const PositionBounds& position) {
  PYRL_CHECK(static_cast<std::size_t>(weight_N.size()) == args.responses.leaves,
             "weight_N: expected one weight per response, ", args.responses.leaves, ", got ",
             weight_N.size());
  PYRL_CHECK((spec.ratio == RatioKind::given) == (scan != Scan::none),
             "scan: expected one for a ratio along a response and none for another, got ",
             static_cast<int>(scan));
  args.weight_N = weight_N.data();
  args.spec = spec;
  args.scan = scan;
  args.position = position;
  args.wide = args.column[0].wide != nullptr;
}

// -- policy_loss --

PolicyLossTotals loss_of_arrays(const std::vector<std::optional<py::array>>& columns,
                                const std::optional<array<bool>>& mask_T,
                                const array<std::int64_t>& offset_N1, const array<double>& weight_N,
                                const TokenSpec& spec, Scan scan, const PositionBounds& position,
                                std::optional<py::array> loss_T,
                                std::optional<py::array> logprob_grad_T,
                                std::optional<py::array> entropy_grad_T) {
  PYRL_CHECK(columns.size() == static_cast<std::size_t>(kTokenColumns) && columns[0],
             "columns: expected ", kTokenColumns, " of them, the first not None");
  const auto tokens = static_cast<std::size_t>(columns[0]->size());
  PolicyLossArgs args;
  args.responses = responses_of(tokens, offset_N1);
  if (mask_T) {
    PYRL_CHECK(static_cast<std::size_t>(mask_T->size()) == tokens, "mask_T: expected ", tokens,
               " entries, got ", mask_T->size());
    args.responses.mask_T = reinterpret_cast<const std::uint8_t*>(mask_T->data());
  }
  for (int c = 0; c < kTokenColumns; ++c)
    if (const auto& values = columns[static_cast<std::size_t>(c)])
      args.column[c] = column_of("columns[" + std::to_string(c) + "]", *values, tokens);
  set_loss(args, weight_N, spec, scan, position);
  const auto output = [&](const char* name, std::optional<py::array>& values) -> void* {
    if (!values) return nullptr;
    const Column column = column_of(name, *values, tokens);
    PYRL_CHECK((column.wide != nullptr) == args.wide, name, ": expected the type of columns[0]");
    return values->mutable_data();
  };
  args.loss_T = output("loss_T", loss_T);
  args.logprob_grad_T = output("logprob_grad_T", logprob_grad_T);
  args.entropy_grad_T = output("entropy_grad_T", entropy_grad_T);
  py::gil_scoped_release release;
  return policy_loss(args);
}

// Addresses on the device.
PolicyLossTotals loss_of_addresses(std::int64_t tokens,
                                   const std::array<ColumnAddress, kTokenColumns>& columns,
                                   std::uintptr_t mask, const array<std::int64_t>& offset_N1,
                                   const array<double>& weight_N, const TokenSpec& spec, Scan scan,
                                   const PositionBounds& position, std::uintptr_t loss,
                                   std::uintptr_t logprob_grad, std::uintptr_t entropy_grad,
                                   [[maybe_unused]] int device,
                                   [[maybe_unused]] std::uintptr_t stream) {
  PolicyLossArgs args;
  args.responses = responses_of(static_cast<std::size_t>(tokens), offset_N1);
  args.responses.mask_T = pointer<const std::uint8_t>(mask);
  for (std::size_t c = 0; c < columns.size(); ++c) args.column[c] = column_at(columns[c]);
  set_loss(args, weight_N, spec, scan, position);
  args.loss_T = pointer<void>(loss);
  args.logprob_grad_T = pointer<void>(logprob_grad);
  args.entropy_grad_T = pointer<void>(entropy_grad);
#ifdef PYRL_WITH_CUDA
  py::gil_scoped_release release;
  return policy_loss_cuda(args, device, pointer<void>(stream));
#else
  no_cuda_kernels("policy_loss");
#endif
}

// -- fused_loss --

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
                          const TokenSpec& spec, const py::dict& stats, std::uintptr_t grad,
                          std::int64_t grad_row_stride, int threads, int device,
                          std::uintptr_t stream) {
  FusedLossArgs args{};
  args.stats.logits_TV = logits;
  args.stats.label_T = pointer<const std::int64_t>(label);
  args.stats.options = options;
  set_columns(stats, args.stats.stat_T);
  args.spec = spec;
  PYRL_CHECK(spec.ratio != RatioKind::given,
             "spec: expected a ratio that is local to a token, got one along a response");
  for (std::size_t c = 0; c < columns.size(); ++c) args.columns.column[c] = column_at(columns[c]);
  args.grad_TV = pointer<void>(grad);
  args.grad_row_stride = grad_row_stride;
  const py::gil_scoped_release release;
  fused_loss_any(args, threads, device, stream);
}

}  // namespace

void bind_loss_records(py::module_& m) {
  bind_kinds(m);
  bind_spec(m);
}

void bind_loss(py::module_& m) {
  m.def("policy_loss", &loss_of_arrays, "columns"_a, "mask_T"_a, "offset_N1"_a, "weight_N"_a,
        "spec"_a, "scan"_a, "position"_a, "loss_T"_a, "logprob_grad_T"_a, "entropy_grad_T"_a);
  m.def("policy_loss_cuda", &loss_of_addresses, "tokens"_a, "columns"_a, "mask"_a, "offset_N1"_a,
        "weight_N"_a, "spec"_a, "scan"_a, "position"_a, "loss"_a, "logprob_grad"_a,
        "entropy_grad"_a, "device"_a, "stream"_a);
  m.def("fused_loss", &fused_loss_addresses, "logits"_a, "label"_a, "options"_a, "columns"_a,
        "spec"_a, "stats"_a, "grad"_a, "grad_row_stride"_a, "threads"_a, "device"_a, "stream"_a);
}

}  // namespace pyrl::bindings
