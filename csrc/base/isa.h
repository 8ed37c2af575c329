// The instruction set of the row kernels: chosen once, the widest that this CPU has.
#pragma once

namespace pyrl {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The environment variable PYRL_ISA (a name of the enum) overrides the choice. Throws
// std::invalid_argument for an unknown name or a set that the CPU or this build lacks.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace pyrl
