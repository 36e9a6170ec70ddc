// The operators over the CUDA kernels: what their calls have in common. `Queue` is where launches go; it makes a device the
// current one as long as it lives. Besides the GPU's own in library.cpp the tests have one that runs emulated kernels.
#pragma once

#include <torch/library.h>

#include <stdexcept>

#include "../operators/attn_diversity.h"
#include "../operators/reattention.h"
#include "kernels.h"

namespace vitdiv {

template <class Queue>
struct Cuda {
  static constexpr c10::DeviceType kType = Queue::kType;

  static void run(const GramForward& args, const at::Tensor& on) {
    launch(args, on, cuda::attention_gram_fwd_scratch, cuda::attention_gram_fwd);
  }
  static void run(const GramBackward& args, const at::Tensor& on) {
    launch(args, on, cuda::attention_gram_bwd_scratch, cuda::attention_gram_bwd);
  }
  static void run(const HeadDots& args, const at::Tensor& on) {
    launch(args, on, cuda::head_dots_scratch, cuda::head_dots);
  }

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

template <class Queue>
void register_cuda_operators(torch::Library& m) {
  using Device = Cuda<Queue>;
  m.impl("attention_gram_fwd", &attention_gram_fwd<Device>);
  m.impl("attention_gram_bwd", &attention_gram_bwd<Device>);
  m.impl("head_dots", &head_dots<Device>);
}

}  // namespace vitdiv
