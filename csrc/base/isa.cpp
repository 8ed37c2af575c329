#include "base/isa.h"

#include <cstdlib>
#include <string_view>

#include "base/check.h"

namespace pyrl {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

// AVX state saved by the operating system included.
bool available(Isa isa) {
#ifdef __x86_64__
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return available(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq");
    case Isa::avx512_bf16:
      return available(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::scalar;
}

Isa choose() {
  const char* name = std::getenv("PYRL_ISA");
  Isa widest = Isa::scalar;
  for (const Isa isa : kAll) {
    if (available(isa)) widest = isa;
    if (name == nullptr || std::string_view(name) != isa_name(isa)) continue;
    PYRL_CHECK(available(isa), "PYRL_ISA: expected an instruction set of this CPU, up to ",
               isa_name(widest), ", got ", name);
    return isa;
  }
  PYRL_CHECK(name == nullptr,
             "PYRL_ISA: expected scalar, avx2, avx512 or avx512_bf16 (the widest here: ",
             isa_name(widest), "), got ", name);
  return widest;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    default:
      return "scalar";
  }
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace pyrl
