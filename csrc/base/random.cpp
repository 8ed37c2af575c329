#include "base/random.h"

#include "base/check.h"

namespace pyrl {

double uniform(std::uint64_t seed, std::uint64_t position, std::uint64_t stream) {
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  std::uint32_t counter[4] = {
      static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32),
      static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t second = std::uint64_t{0xCD9E8D57} * counter[2];
    const std::uint32_t mixed0 = static_cast<std::uint32_t>(second >> 32) ^ counter[1] ^ key[0];
    const std::uint32_t mixed2 = static_cast<std::uint32_t>(first >> 32) ^ counter[3] ^ key[1];
    counter[0] = mixed0;
    counter[1] = static_cast<std::uint32_t>(second);
    counter[2] = mixed2;
    counter[3] = static_cast<std::uint32_t>(first);
    key[0] += 0x9E3779B9;  // the golden ratio
    key[1] += 0xBB67AE85;  // sqrt(3) - 1
  }
  const std::uint64_t bits = (static_cast<std::uint64_t>(counter[0]) << 32) | counter[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

void uniforms(std::span<const std::uint64_t> seed_B, std::span<const std::int64_t> position_B,
              std::span<double> uniform_B) {
  PYRL_CHECK(seed_B.size() == position_B.size(), "position_B: expected ", seed_B.size(),
             " entries, got ", position_B.size());
  for (std::size_t b = 0; b < seed_B.size(); ++b) {
    PYRL_CHECK(position_B[b] >= 0, "position_B: expected >= 0, got ", position_B[b], " in row ", b);
    uniform_B[b] = uniform(seed_B[b], static_cast<std::uint64_t>(position_B[b]));
  }
}

}  // namespace pyrl
