// Registers the CUDA kernels for CUDA tensors. No header of torch's that needs CUDA: the module compiles and
// loads beside any torch, and without a driver.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "core/stream.h"
#include "operators.h"

namespace vitdiv {
namespace {

class Gpu {
 public:
  static constexpr c10::DeviceType kType = c10::kCUDA;

  explicit Gpu(c10::Device device) : guard_(device) {}

  template <class Args>
  void run(void (*kernels)(const Args&, void*, void*), const Args& args, const at::Tensor& scratch) {
    const c10::Device device = guard_.current_device();
    const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
    void* handle = nullptr;
    TORCH_CHECK(cuda_stream_of(stream, &handle),
                "this torch does not tell its current CUDA stream: the kernels need torch 2.11 or later");
    kernels(args, scratch.data_ptr(), handle);
  }

 private:
  c10::DeviceGuard guard_;
};

}  // namespace
}  // namespace vitdiv

TORCH_LIBRARY_IMPL(vitdiv, CUDA, m) { vitdiv::register_operators<vitdiv::Cuda<vitdiv::Gpu>>(m); }
