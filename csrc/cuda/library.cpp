// Registers the CUDA kernels for CUDA tensors. No header of torch's that needs CUDA: the module compiles and loads beside any
// torch, and without a driver.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "operators.h"

// The C interface that compiled models use, in libtorch_cuda; null beside a torch without it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace vitdiv {
namespace {

template <class Stream>
void* handle_of(const Stream& stream) {
  if constexpr (requires { stream.native_handle(); }) {
    return stream.native_handle();
  } else {  // torch before 2.12
    void* handle = nullptr;
    TORCH_CHECK(
        aoti_torch_get_current_cuda_stream != nullptr &&
            aoti_torch_get_current_cuda_stream(stream.device_index(), &handle) == 0,
        "the current CUDA stream of this torch cannot be asked for: the kernels need torch 2.12 or later");
    return handle;
  }
}

class Gpu {
 public:
  static constexpr c10::DeviceType kType = c10::kCUDA;

  explicit Gpu(c10::Device device) : guard_(device) {}

  template <class Args>
  void run(void (*kernels)(const Args&, void*, void*), const Args& args, const at::Tensor& scratch) {
    const c10::Device device = guard_.current_device();
    const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
    kernels(args, scratch.data_ptr(), handle_of(stream));
  }

 private:
  c10::DeviceGuard guard_;
};

}  // namespace
}  // namespace vitdiv

TORCH_LIBRARY_IMPL(vitdiv, CUDA, m) { vitdiv::register_cuda_operators<vitdiv::Gpu>(m); }
