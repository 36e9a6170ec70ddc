// The operators over the CUDA kernels: what their calls have in common. `Queue` is where launches go; it
// makes a device the current one as long as it lives. Besides the GPU's own in library.cpp the tests have one
// that runs emulated kernels.
#pragma once

#include <stdexcept>

#include "../operators.h"
#include "kernels.h"

namespace vitdiv {

template <class Queue>
struct Cuda {
  static constexpr c10::DeviceType kType = Queue::kType;
  static constexpr bool kCudaKernels = true;

  // [items, N, D], the items at equal distances: a view where the leading axes are one in memory.
  static at::Tensor items(const at::Tensor& x) {
    if (x.dim() < 2) return x;
    const at::IntArrayRef leading = x.sizes().slice(0, x.dim() - 2);
    return unit_stride(x.reshape({c10::multiply_integers(leading), x.size(-2), x.size(-1)}));
  }

#define VITDIV_RUN(operation, name, Args)                   \
  static void run(const Args& args, const at::Tensor& on) { \
    launch(args, on, cuda::name##_scratch, cuda::name);     \
  }
  VITDIV_KERNELS(VITDIV_RUN)
#undef VITDIV_RUN

 private:
  template <class Args>
  static void launch(const Args& args, const at::Tensor& on, int64_t (*scratch_bytes)(const Args&),
                     void (*kernels)(const Args&, void*, void*)) {
    try {
      Queue queue(on.device());
      // the allocator gives it to later work of the same stream only
      const at::Tensor scratch = at::empty({scratch_bytes(args)}, on.options().dtype(at::kByte));
      queue.run(kernels, args, scratch);
    } catch (const std::invalid_argument& refused) {
      TORCH_CHECK_VALUE(false, refused.what());
    }
  }
};

}  // namespace vitdiv
