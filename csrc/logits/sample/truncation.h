// Which tokens can be drawn. Also read by nvcc, hence C++17.
#pragma once

#include <cstdint>

namespace pyrl::logits::sample {

// Applied in this order: temperature, min-p, top-k, top-p, top-h, renormalise. Ties go to the lower
// id.
struct Truncation {
  double temperature = 1;  // 0: the most probable token, statistics at temperature 1
  std::int64_t top_k = 0;  // 0 keeps all
  double top_p = 1;        // of the mass that min-p and top-k left; the crossing token stays
  double min_p = 0;        // keeps tokens with at least this share of the largest probability
  // Keeps as many tokens as have, renormalised, at most this share of the whole row's entropy.
  double top_h = 1;

  // Calls visit(name, pointer to member) for each field.
  template <typename Visit>
  static void each_field(Visit&& visit) {
    visit("temperature", &Truncation::temperature);
    visit("top_k", &Truncation::top_k);
    visit("top_p", &Truncation::top_p);
    visit("min_p", &Truncation::min_p);
    visit("top_h", &Truncation::top_h);
  }
};

// Tokens that rows may not draw, after truncation; those of row b are
// token_E[offset_B1[b]..offset_B1[b + 1]). Null: no row has any.
struct Excluded {
  const std::int32_t* token_E = nullptr;
  const std::int64_t* offset_B1 = nullptr;
};

}  // namespace pyrl::logits::sample
