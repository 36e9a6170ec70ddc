// The operators of csrc/cuda/operators.h over emulated kernels, for CPU tensors:
// tests/support/emulated_operators.py declares them in the namespace vitdiv_emulated, links the kernels and
// includes memory/*.h before this file.
#include "../../../csrc/cuda/operators.h"

#include "memory.h"

namespace vitdiv {
namespace {

class Emulated {
 public:
  static constexpr c10::DeviceType kType = c10::kCPU;

  explicit Emulated(c10::Device) {}
  ~Emulated() { emulation::forbid_all(); }

  template <class Args>
  void run(void (*kernels)(const Args&, void*, void*), const Args& args, const at::Tensor& scratch) {
    allow_all(args);
    allow(scratch.data_ptr(), scratch.numel(), true);
    kernels(args, scratch.data_ptr(), nullptr);
  }
};

}  // namespace
}  // namespace vitdiv

TORCH_LIBRARY_IMPL(vitdiv_emulated, CPU, m) { vitdiv::register_operators<vitdiv::Cuda<vitdiv::Emulated>>(m); }
