// How many threads a kernel's parallel region gets: 1 if these sources were compiled without OpenMP.
#include "../kernels.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {

int count_threads(int threads) {
  int count = 1;
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
#pragma omp single
    count = omp_get_num_threads();
#endif
  }
  return threads > 0 ? count : 1;
}

}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
