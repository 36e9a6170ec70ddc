// The CPU kernels' entry points. Each exists once per instruction set, in a namespace of its own; dispatch.h
// chooses. Every entry point returns false when its scratch memory cannot be had.
#pragma once

#include "../kernels.def"

namespace vitdiv {

#define VITDIV_POINTER(operation, name, Args) bool (*name)(const Args&);
#define VITDIV_DECLARATION(operation, name, Args) bool name(const Args& args);
#define VITDIV_NAME(operation, name, Args) name,

struct CpuKernels {
  const char* capability;
  VITDIV_KERNELS(VITDIV_POINTER)
  int (*count_threads)(int threads);
};

#define VITDIV_CPU_KERNELS(isa)                                                                           \
  namespace cpu_##isa {                                                                                   \
    VITDIV_KERNELS(VITDIV_DECLARATION)                                                                    \
    int count_threads(int threads);                                                                       \
    inline constexpr CpuKernels kKernels{#isa, VITDIV_KERNELS(VITDIV_NAME) /* and last */ count_threads}; \
  }

VITDIV_CPU_KERNELS(default)
#if defined(VITDIV_CPU_X86_DISPATCH)
VITDIV_CPU_KERNELS(avx2)
VITDIV_CPU_KERNELS(avx512)
#endif

#undef VITDIV_POINTER
#undef VITDIV_DECLARATION
#undef VITDIV_NAME
#undef VITDIV_CPU_KERNELS

}  // namespace vitdiv
