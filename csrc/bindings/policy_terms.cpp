#include <map>

#include "bindings/token_column.h"
#include "loss/terms.h"

namespace pyrl::bindings {

using namespace loss;
namespace {

const std::map<std::string, Column LossColumns::*> kFields{
    {"logprob_T", &LossColumns::logprob},
    {"entropy_T", &LossColumns::entropy},
    {"nucleus_entropy_T", &LossColumns::nucleus_entropy},
    {"old_logprob_T", &LossColumns::old_logprob},
    {"rollout_logprob_T", &LossColumns::rollout_logprob},
    {"proxy_logprob_T", &LossColumns::proxy_logprob},
    {"second_logprob_T", &LossColumns::second_logprob},
    {"advantage_T", &LossColumns::advantage},
    {"reward_T", &LossColumns::reward},
    {"sum_p2_T", &LossColumns::sum_p2},
    {"sum_p2_logp_T", &LossColumns::sum_p2_logp},
};

// Keeps the arrays that its columns read.
struct Columns {
  LossColumns core;
  std::map<std::string, py::array> arrays;
  MaskArray mask_T;
  OffsetArray offset_N1, group_N;

  Columns(std::size_t tokens, std::map<std::string, py::array> given, MaskArray mask,
          OffsetArray offset, OffsetArray group)
      : arrays(std::move(given)),
        mask_T(std::move(mask)),
        offset_N1(std::move(offset)),
        group_N(std::move(group)) {
    core.responses = responses_of(tokens, mask_T, offset_N1);
    for (const auto& [name, values] : arrays) {
      const auto field = kFields.find(name);
      PYRL_CHECK(field != kFields.end(), "columns: there is no ", name);
      core.*field->second = column_of(name, values, tokens);
    }
    if (!group_N) return;
    PYRL_CHECK(static_cast<std::size_t>(group_N->size()) == core.responses.leaves,
               "group_N: expected ", core.responses.leaves, " entries, got ", group_N->size());
    for (const std::int64_t group : view(*group_N))
      PYRL_CHECK(group >= 0 && group < group_N->size(), "group_N: expected numbers from 0 below ",
                 group_N->size(), " (one per response), got ", group);
    core.group_N = group_N->data();
  }

  // What an axis reads; ValueError names it.
  void need(const char* axis, std::initializer_list<const char*> names, bool responses) const {
    for (const char* name : names)
      PYRL_CHECK(arrays.count(name), axis, ": needs the column ", name);
    PYRL_CHECK(!responses || offset_N1, axis, ": needs the column offset_N1");
  }
};

template <typename Fill>
py::array_t<double> filled(const Columns& columns, Fill fill) {
  py::array_t<double> out(static_cast<py::ssize_t>(columns.core.responses.tokens));
  double* values = out.mutable_data();
  py::gil_scoped_release release;
  fill(columns.core, values);
  return out;
}

template <typename Choose>
py::array_t<bool> chosen(const Columns& columns, Choose choose) {
  py::array_t<bool> out(static_cast<py::ssize_t>(columns.core.responses.tokens));
  auto* values = reinterpret_cast<std::uint8_t*>(out.mutable_data());
  py::gil_scoped_release release;
  choose(columns.core, values);
  return out;
}

Level level_of(int level) { return static_cast<Level>(level); }

void bind_columns(py::class_<Columns>& c) {
  c.def(
      "entropy_advantage",
      [](const Columns& columns, double k) {
        columns.need("EntropyZ", {"advantage_T", "entropy_T"}, false);
        return filled(columns, [&](auto& in, double* out) { entropy_advantage(in, k, out); });
      },
      "k"_a);
  c.def(
      "blend_advantage",
      [](const Columns& columns, double target, double limit, double measured) {
        columns.need("Blend", {"advantage_T", "reward_T", "second_logprob_T", "old_logprob_T"},
                     true);
        return filled(columns, [&](auto& in, double* out) {
          blend_advantage(in, target, limit, measured, out);
        });
      },
      "target"_a, "limit"_a, "measured"_a);
  c.def(
      "token_group_advantage",
      [](const Columns& columns, double limit) {
        columns.need("TokenGroup", {"advantage_T", "reward_T"}, true);
        PYRL_CHECK(columns.group_N, "TokenGroup: needs the column group_N");
        return filled(columns,
                      [&](auto& in, double* out) { token_group_advantage(in, limit, out); });
      },
      "limit"_a);
  c.def(
      "band_advantage",
      [](const Columns& columns, double low, double high) {
        columns.need("EntropyBand", {"advantage_T", "entropy_T", "reward_T"}, false);
        return filled(columns, [&](auto& in, double* out) { band_advantage(in, low, high, out); });
      },
      "low"_a, "high"_a);
  c.def(
      "sign_advantage",
      [](const Columns& columns, bool positive) {
        columns.need("SignFilter", {"advantage_T"}, false);
        return filled(columns, [&](auto& in, double* out) { sign_advantage(in, positive, out); });
      },
      "positive"_a);
  c.def(
      "expert_scale",
      [](const Columns& columns, double passed) {
        columns.need("ExpertLeak", {"advantage_T", "reward_T"}, false);
        return filled(columns, [&](auto& in, double* out) { expert_scale(in, passed, out); });
      },
      "passed"_a);
  c.def(
      "importance",
      [](const Columns& columns, int level, double cap, double floor, bool normalize) {
        columns.need("TIS", {"old_logprob_T", "rollout_logprob_T"},
                     level_of(level) != Level::token);
        return filled(columns, [&](auto& in, double* out) {
          importance(in, level_of(level), cap, floor, normalize, out);
        });
      },
      "level"_a, "cap"_a, "floor"_a, "normalize"_a);
  c.def(
      "importance_window",
      [](const Columns& columns, double low, double high) {
        columns.need("IcePop", {"old_logprob_T", "rollout_logprob_T"}, false);
        return filled(columns,
                      [&](auto& in, double* out) { importance_window(in, low, high, out); });
      },
      "low"_a, "high"_a);
  c.def(
      "steer",
      [](const Columns& columns, bool exponential, double least, double most) {
        columns.need("Steer", {"logprob_T", "old_logprob_T", "advantage_T", "entropy_T"}, false);
        return filled(columns,
                      [&](auto& in, double* out) { steer(in, exponential, least, most, out); });
      },
      "exponential"_a, "least"_a, "most"_a);
  c.def("entropy_heat", [](const Columns& columns) {
    columns.need("EntropyClip", {"entropy_T"}, false);
    return filled(columns, [&](auto& in, double* out) { entropy_heat(in, out); });
  });
  c.def(
      "entropy_band",
      [](const Columns& columns, int level, double low, double high, double height) {
        columns.need("EntropySmoothing", {"entropy_T"}, level_of(level) != Level::token);
        return filled(columns, [&](auto& in, double* out) {
          entropy_band(in, level_of(level), low, high, height, out);
        });
      },
      "level"_a, "low"_a, "high"_a, "height"_a);
  c.def(
      "nucleus_peaks",
      [](const Columns& columns, double quantile) {
        columns.need("NucleusAnchor", {"nucleus_entropy_T"}, true);
        double mean = 0;
        auto weight_T = filled(
            columns, [&](auto& in, double* out) { mean = nucleus_peaks(in, quantile, out); });
        return py::make_tuple(mean, weight_T);
      },
      "quantile"_a);
}

void bind_choices(py::class_<Columns>& c) {
  c.def(
      "keep_outside_covariance",
      [](const Columns& columns, double lower, double upper, double share, double clip_low,
         double clip_high, std::uint64_t seed) {
        columns.need("ClipCov", {"advantage_T", "logprob_T", "old_logprob_T"}, false);
        return chosen(columns, [&](auto& in, auto* out) {
          keep_outside_covariance(in, lower, upper, share, clip_low, clip_high, seed, out);
        });
      },
      "lower"_a, "upper"_a, "share"_a, "clip_low"_a, "clip_high"_a, "seed"_a);
  c.def(
      "choose_covariance",
      [](const Columns& columns, double share) {
        columns.need("TopCovariance", {"advantage_T", "logprob_T"}, false);
        return chosen(columns, [&](auto& in, auto* out) { choose_covariance(in, share, out); });
      },
      "share"_a);
  c.def(
      "choose_improbable",
      [](const Columns& columns, double share) {
        columns.need("Improbable", {"advantage_T", "logprob_T", "proxy_logprob_T"}, false);
        return chosen(columns, [&](auto& in, auto* out) { choose_improbable(in, share, out); });
      },
      "share"_a);
  c.def(
      "keep_by_score",
      [](const Columns& columns, bool rollout, double mu) {
        columns.need("ClipB",
                     {"advantage_T", "entropy_T", rollout ? "rollout_logprob_T" : "old_logprob_T"},
                     false);
        return chosen(columns, [&](auto& in, auto* out) { keep_by_score(in, rollout, mu, out); });
      },
      "rollout"_a, "mu"_a);
  c.def(
      "keep_by_centred_score",
      [](const Columns& columns, bool rollout, double mu, double max_share) {
        columns.need("ClipV",
                     {"advantage_T", "entropy_T", "sum_p2_T", "sum_p2_logp_T",
                      rollout ? "rollout_logprob_T" : "old_logprob_T"},
                     false);
        return chosen(columns, [&](auto& in, auto* out) {
          keep_by_centred_score(in, rollout, mu, max_share, out);
        });
      },
      "rollout"_a, "mu"_a, "max_share"_a);
  c.def(
      "keep_top_entropy",
      [](const Columns& columns, double share) {
        columns.need("TopEntropy", {"entropy_T"}, false);
        return chosen(columns, [&](auto& in, auto* out) { keep_top_entropy(in, share, out); });
      },
      "share"_a);
  c.def(
      "keep_matched",
      [](const Columns& columns, int mismatch, int level, double low, double high) {
        columns.need("Matched", {"old_logprob_T", "rollout_logprob_T"}, true);
        return chosen(columns, [&](auto& in, auto* out) {
          keep_matched(in, static_cast<Mismatch>(mismatch), level_of(level), low, high, out);
        });
      },
      "mismatch"_a, "level"_a, "low"_a, "high"_a);
  c.def(
      "keep_near_generator",
      [](const Columns& columns, double gamma) {
        columns.need("NearGenerator", {"advantage_T", "old_logprob_T", "rollout_logprob_T"}, true);
        return chosen(columns, [&](auto& in, auto* out) { keep_near_generator(in, gamma, out); });
      },
      "gamma"_a);
}

}  // namespace

void bind_policy_terms(py::module_& m) {
  py::class_<Columns> columns(m, "LossColumns");
  columns.def(py::init<std::size_t, std::map<std::string, py::array>, MaskArray, OffsetArray,
                       OffsetArray>(),
              "tokens"_a, "columns"_a, "mask_T"_a.none(true) = py::none(),
              "offset_N1"_a.none(true) = py::none(), "group_N"_a.none(true) = py::none());
  bind_columns(columns);
  bind_choices(columns);
  m.def(
      "count_tokens",
      [](std::size_t tokens, const MaskArray& mask_T, const array<std::int64_t>& offset_N1) {
        const Responses responses = responses_of(tokens, mask_T, offset_N1);
        array<std::int64_t> tokens_N(static_cast<py::ssize_t>(responses.leaves));
        count_tokens(responses, tokens_N.mutable_data());
        return tokens_N;
      },
      "tokens"_a, "mask_T"_a.none(true), "offset_N1"_a);
}

}  // namespace pyrl::bindings
