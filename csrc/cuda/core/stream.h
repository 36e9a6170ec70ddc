// The cudaStream_t behind a stream of torch's, whose headers give it only from torch 2.11 on.
#pragma once

#include <dlfcn.h>

#include <cstdint>

namespace vitdiv {

// The current stream of a device by the C interface that compiled models use; false where this process has no
// libtorch_cuda or the call fails. Python loads that library for itself alone: its symbols are found in it,
// and nowhere else.
inline bool current_cuda_stream(int32_t device, void** stream) {
  using Function = int32_t (*)(int32_t device, void** stream);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  return function != nullptr && function(device, stream) == 0;
}

template <class Stream>
bool cuda_stream_of(const Stream& stream, void** handle) {
  if constexpr (requires { stream.native_handle(); }) {
    *handle = stream.native_handle();
    return true;
  } else {
    return current_cuda_stream(stream.device_index(), handle);
  }
}

}  // namespace vitdiv
