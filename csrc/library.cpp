// The library libvitdiv: defines the operators and registers the CPU kernels; cuda/library.cpp registers the
// CUDA kernels. It needs torch and no Python, so that a C++ program that runs an exported model has only to
// load it.
#include <new>

#include "batch_norm.h"
#include "cpu/dispatch.h"
#include "facts.h"
#include "operators.h"

namespace vitdiv {
namespace {

const CpuKernels& cpu() {
  static const CpuKernels kernels = choose_cpu_kernels();
  return kernels;
}

struct Cpu {
  static constexpr c10::DeviceType kType = c10::kCPU;
  static constexpr bool kCudaKernels = false;

  static at::Tensor items(const at::Tensor& x) { return unit_stride(x); }

#define VITDIV_RUN(operation, name, Args)                                     \
  static void run(const Args& args, const at::Tensor&) {                      \
    if (!cpu().name(args)) throw std::bad_alloc(); /* a Python MemoryError */ \
  }
  VITDIV_KERNELS(VITDIV_RUN)
#undef VITDIV_RUN
};

}  // namespace

std::string cpu_capability() { return cpu().capability; }
int num_threads() { return cpu().count_threads(at::get_num_threads()); }

}  // namespace vitdiv

TORCH_LIBRARY(vitdiv, m) {
  vitdiv::define_operators(m);
  for (const char* schema : vitdiv::kBatchNorm) m.def(schema);
}

TORCH_LIBRARY_IMPL(vitdiv, CPU, m) {
  vitdiv::register_operators<vitdiv::Cpu>(m);
  m.impl("batch_norm_fwd", &vitdiv::batch_norm_fwd);
  m.impl("batch_norm_coupling", &vitdiv::batch_norm_coupling);
  m.impl("batch_norm_bwd", &vitdiv::batch_norm_bwd);
}
