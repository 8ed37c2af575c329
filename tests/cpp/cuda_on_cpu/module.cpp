// The core's own bindings over the emulated kernels. Arrays "on the device" are ordinary memory.
#include <stdexcept>

#include "base/random.h"
#include "bindings/bind.h"
#include "block.h"
#include "faulty.h"
#include "logits/sample/sample_tokens.h"
#include "logits/stats/token_stats.h"
#include "loss/fused_loss.h"
#include "loss/policy_loss.h"

namespace pyrl {
namespace {

[[noreturn]] void no_cpu_kernels() {
  throw std::logic_error("expected device >= 0: this module has the CUDA kernels alone");
}

}  // namespace

void uniforms(std::span<const std::uint64_t>, std::span<const std::int64_t>, std::span<double>) {
  no_cpu_kernels();
}

namespace logits::stats {
void token_stats(const TokenStatsArgs&, int) { no_cpu_kernels(); }
void token_stats_grad(const TokenStatsGradArgs&, int) { no_cpu_kernels(); }
}  // namespace logits::stats

namespace logits::sample {
void sample_tokens(const LogitMatrix&, std::span<const std::uint64_t>,
                   std::span<const std::int64_t>, const Truncation&, const Excluded&,
                   const SampledTokens&, int) {
  no_cpu_kernels();
}
}  // namespace logits::sample

namespace loss {
PolicyLossTotals policy_loss(const PolicyLossArgs&) { no_cpu_kernels(); }
void fused_loss(const FusedLossArgs&, int) { no_cpu_kernels(); }
}  // namespace loss

}  // namespace pyrl

PYBIND11_MODULE(cuda_on_cpu, m) {
  pyrl::bindings::bind_logits(m);
  pyrl::bindings::bind_loss(m);
  m.def("run_faulty", &cuda_on_cpu::run_faulty);
  m.def("order_threads", [](std::uint64_t seed) { cuda_on_cpu::block().order_threads(seed); });
  m.def("current_device", &cuda_on_cpu::current_device);
  m.def("set_current_device", &cuda_on_cpu::set_current_device);
}
