// The CPU kernels' entry points. Each exists once per instruction set, in a namespace of its own; dispatch.h chooses.
// Every entry point returns false when its scratch memory cannot be had.
#pragma once

#include "../arguments.h"

namespace vitdiv {

#define VITDIV_DECLARE_CPU_KERNELS(ns)                        \
  namespace ns {                                              \
  bool pairwise_cosine_fwd(const CosineForward& args);        \
  bool pairwise_cosine_bwd(const CosineBackward& args);       \
  bool pairwise_logsumexp_fwd(const LogSumExpForward& args);  \
  bool pairwise_logsumexp_bwd(const LogSumExpBackward& args); \
  bool pairwise_nearest(const NearestForward& args);          \
  bool two_gram_fwd(const TwoGramForward& args);              \
  bool two_gram_bwd(const TwoGramBackward& args);             \
  bool attention_gram_fwd(const GramForward& args);           \
  bool attention_gram_bwd(const GramBackward& args);          \
  bool reattention_fwd(const ReattentionForward& args);       \
  bool reattention_bwd(const ReattentionBackward& args);      \
  bool head_dots(const HeadDots& args);                       \
  int count_threads(int threads);                             \
  }

VITDIV_DECLARE_CPU_KERNELS(cpu_default)
#if defined(VITDIV_CPU_X86_DISPATCH)
VITDIV_DECLARE_CPU_KERNELS(cpu_avx2)
VITDIV_DECLARE_CPU_KERNELS(cpu_avx512)
#endif

}  // namespace vitdiv
