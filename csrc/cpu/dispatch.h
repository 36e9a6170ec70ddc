// Chooses, once, the CPU kernels of the best instruction set that the machine has and VITDIV_CPU_CAPABILITY allows.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace vitdiv {

struct CpuKernels {
  const char* capability;
  bool (*pairwise_cosine_fwd)(const CosineForward&);
  bool (*pairwise_cosine_bwd)(const CosineBackward&);
  bool (*pairwise_logsumexp_fwd)(const LogSumExpForward&);
  bool (*pairwise_logsumexp_bwd)(const LogSumExpBackward&);
  bool (*pairwise_nearest)(const NearestForward&);
  bool (*two_gram_fwd)(const TwoGramForward&);
  bool (*two_gram_bwd)(const TwoGramBackward&);
  bool (*attention_gram_fwd)(const GramForward&);
  bool (*attention_gram_bwd)(const GramBackward&);
  bool (*reattention_fwd)(const ReattentionForward&);
  bool (*reattention_bwd)(const ReattentionBackward&);
  bool (*head_dots)(const HeadDots&);
  int (*count_threads)(int);
};

#define VITDIV_CPU_KERNELS(name)                                                                     \
  CpuKernels {                                                                                       \
    #name, cpu_##name::pairwise_cosine_fwd, cpu_##name::pairwise_cosine_bwd,                         \
        cpu_##name::pairwise_logsumexp_fwd, cpu_##name::pairwise_logsumexp_bwd,                      \
        cpu_##name::pairwise_nearest, cpu_##name::two_gram_fwd, cpu_##name::two_gram_bwd,            \
        cpu_##name::attention_gram_fwd, cpu_##name::attention_gram_bwd, cpu_##name::reattention_fwd, \
        cpu_##name::reattention_bwd, cpu_##name::head_dots, cpu_##name::count_threads                \
  }

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
  if (avx512 && most == "avx512") return VITDIV_CPU_KERNELS(avx512);
  if (avx2 && most != "default") return VITDIV_CPU_KERNELS(avx2);
#endif
  return VITDIV_CPU_KERNELS(default);
}

}  // namespace vitdiv
