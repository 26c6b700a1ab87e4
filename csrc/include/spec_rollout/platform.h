// Compiler and target macros shared by host and device code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SR_HD __host__ __device__ __forceinline__
#else
#define SR_HD inline
#endif

// CPU sources are compiled once per instruction-set level and chosen at load time
// (csrc/cpu/dispatch.cpp). Header functions live in an inline namespace of that level, so that the
// linker can never pick an AVX-512 body for a caller that was compiled for a machine without it.
#if !defined(SPEC_ROLLOUT_ISA)
#define SPEC_ROLLOUT_ISA generic
#endif
