#include "logits/element.h"

#include <bit>
#include <cmath>

namespace pyrl::logits {

float widen_one(Float16 z) {
  const std::uint32_t magnitude = (z.bits & 0x7fffu) << 13;
  // The exponent bias differs by 112; the product also normalises subnormals.
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t special = (z.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  const std::uint32_t sign = static_cast<std::uint32_t>(z.bits & 0x8000u) << 16;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | special | sign);
}

float widen_one(BFloat16 z) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(z.bits) << 16);
}

void narrow_one(float value, Float16* out) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const float magnitude = std::abs(value);
  std::uint32_t half;
  if (!(magnitude < 65536.0f)) {
    half = std::isnan(value) ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    // The sum's last bit is worth 2^-24, the step of half subnormals: the addition rounds.
    half = std::bit_cast<std::uint32_t>(magnitude + 0.5f) - std::bit_cast<std::uint32_t>(0.5f);
  } else {
    const std::uint32_t rebiased = std::bit_cast<std::uint32_t>(magnitude) - (112u << 23);
    half = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(half | sign);
}

void narrow_one(float value, BFloat16* out) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  if (std::isnan(value)) rounded = bits | 0x400000u;
  if ((bits & 0x7f800000u) == 0) rounded = bits & 0x80000000u;
  out->bits = static_cast<std::uint16_t>(rounded >> 16);
}

}  // namespace pyrl::logits
