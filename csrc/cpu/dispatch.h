// Chooses, once, the CPU kernels of the best instruction set that the machine has and VITDIV_CPU_CAPABILITY
// allows.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace vitdiv {

inline CpuKernels choose_cpu_kernels() {
  const char* variable = std::getenv("VITDIV_CPU_CAPABILITY");
  const std::string most = variable && *variable ? variable : "avx512";
  if (most != "default" && most != "avx2" && most != "avx512")
    throw std::runtime_error("VITDIV_CPU_CAPABILITY must be default, avx2 or avx512, got '" + most + "'");
#if defined(VITDIV_CPU_X86_DISPATCH)
  __builtin_cpu_init();
  // f16c came with AVX, before AVX2, and is not among the names that every compiler's builtin knows
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && most == "avx512") return cpu_avx512::kKernels;
  if (avx2 && most != "default") return cpu_avx2::kKernels;
#endif
  return cpu_default::kKernels;
}

}  // namespace vitdiv
