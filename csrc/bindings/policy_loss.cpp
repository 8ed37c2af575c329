#include "policy_loss.h"

#include "bindings/bind.h"

namespace pyrl {
namespace {

template <typename Real>
py::tuple policy_loss_arrays(const array<Real>& logprob_T, const array<Real>& entropy_T,
                             const array<Real>& old_logprob_T, const array<Real>& advantage_T,
                             const array<Real>& weight_T, const array<Real>& clip_low_T,
                             const array<Real>& clip_high_T, const array<Real>& ref_logprob_T,
                             double dual_clip, int kl, double kl_coef, double entropy_coef) {
  array<Real> loss_T(logprob_T.size()), logprob_grad_T(logprob_T.size()),
      entropy_grad_T(logprob_T.size());
  const PolicyLossArgs<Real> args{view(logprob_T),
                                  view(entropy_T),
                                  view(old_logprob_T),
                                  view(advantage_T),
                                  view(weight_T),
                                  view(clip_low_T),
                                  view(clip_high_T),
                                  view(ref_logprob_T),
                                  {dual_clip, static_cast<KlEstimator>(kl), kl_coef, entropy_coef},
                                  view_mutable(loss_T),
                                  view_mutable(logprob_grad_T),
                                  view_mutable(entropy_grad_T)};
  PolicyLossTotals totals;
  {
    py::gil_scoped_release release;
    totals = policy_loss(args);
  }
  return py::make_tuple(loss_T, logprob_grad_T, entropy_grad_T,
                        py::make_tuple(totals.loss, totals.weight, totals.clipped_low,
                                       totals.clipped_high, totals.clipped_dual, totals.kl_old,
                                       totals.kl_ref, totals.ratio, totals.ratio_max));
}

template <typename Real>
void bind(py::module_& m, const char* name) {
  m.def(name, &policy_loss_arrays<Real>, "logprob_T"_a.noconvert(), "entropy_T"_a.noconvert(),
        "old_logprob_T"_a.noconvert(), "advantage_T"_a.noconvert(), "weight_T"_a.noconvert(),
        "clip_low_T"_a.noconvert(), "clip_high_T"_a.noconvert(), "ref_logprob_T"_a.noconvert(),
        "dual_clip"_a, "kl"_a, "kl_coef"_a, "entropy_coef"_a);
}

}  // namespace

void bind_policy_loss(py::module_& m) {
  bind<float>(m, "policy_loss_float32");
  bind<double>(m, "policy_loss_float64");
}

}  // namespace pyrl
