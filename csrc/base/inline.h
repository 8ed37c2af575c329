// PYRL_INLINE: inlined wherever it is called, also by nvcc. A copy that the compiler left in a file
// for a wider instruction set could be the one that the linker keeps for all.
#pragma once

#ifdef __CUDACC__
#define PYRL_INLINE __forceinline__ __host__ __device__
#else
#define PYRL_INLINE inline __attribute__((always_inline))
#endif
