// The instruction set of the kernels: chosen once, the widest that this CPU has.
//
// An operation has a `kernels.h` with a table of functions, a `body.h` that is compiled once for
// each instruction set, and the files scalar, avx2 and avx512.cpp, which fill the table. These
// files may be compiled for instructions that this CPU lacks: they include those two headers alone,
// whose functions are static, in an unnamed namespace or PYRL_INLINE, as all of this header are.
#pragma once

#include "base/inline.h"

namespace pyrl {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The environment variable PYRL_ISA (a name of the enum) overrides the choice. Throws
// std::invalid_argument for an unknown name or a set that the CPU or this build lacks.
Isa isa();

const char* isa_name(Isa isa);

// The table of isa(). `Kernels` is a table with a static function for each instruction set up to
// Kernels::kWidest, of the set's name, that returns the set's table.
template <typename Kernels>
PYRL_INLINE const Kernels& chosen() {
#ifdef __x86_64__
  if constexpr (Kernels::kWidest >= Isa::avx512_bf16) {
    if (isa() >= Isa::avx512_bf16) return Kernels::avx512_bf16();
  }
  if constexpr (Kernels::kWidest >= Isa::avx512) {
    if (isa() >= Isa::avx512) return Kernels::avx512();
  }
  if constexpr (Kernels::kWidest >= Isa::avx2) {
    if (isa() >= Isa::avx2) return Kernels::avx2();
  }
#endif
  return Kernels::scalar();
}

}  // namespace pyrl
