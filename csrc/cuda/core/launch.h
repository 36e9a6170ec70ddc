// How kernels are launched, for platform.cuh. What the driver refuses is thrown as std::runtime_error.
#pragma once

#include <cstdint>

namespace vitdiv::cuda {

// Bytes of shared memory that one block may use on the current device.
int64_t shared_memory_limit(const char* operation);

// Bytes of device memory that a workspace may take on the current device: two thirds of its L2, so that what
// one launch writes there is still in it for the next.
int64_t workspace_bytes(const char* operation);

// `arguments`: a pointer to each of the kernel's.
void launch(const char* operation, const void* kernel, int64_t blocks, int threads, int64_t shared_bytes,
            void* stream, void** arguments);

}  // namespace vitdiv::cuda
