// Launches, by the CUDA runtime. The tests compile this file over a runtime of their own:
// tests/cuda/emulation/launches.cpp.
#include "launch.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "../../facts.h"

namespace vitdiv::cuda {
namespace {

void check(const char* operation, cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(operation) + ": CUDA says: " + cudaGetErrorString(error));
}

int current_device(const char* operation) {
  int device = 0;
  check(operation, cudaGetDevice(&device));
  return device;
}

int shared_memory_limit_of(const char* operation, int device) {
  int bytes = 0;
  check(operation, cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Lets a kernel use all the shared memory that a block may have on the current device. Once, and never less
// afterwards: the attribute is the kernel's, and another thread may be about to launch it with more than this
// launch needs.
void allow_all_shared_memory(const char* operation, const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;  // kernels, devices
  const int device = current_device(operation);
  const std::lock_guard lock(mutex);  // until it is set: who finds it in `allowed` may launch
  if (allowed.count({kernel, device})) return;
  check(operation, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        shared_memory_limit_of(operation, device)));
  allowed.insert({kernel, device});
}

}  // namespace

int64_t shared_memory_limit(const char* operation) {
  return shared_memory_limit_of(operation, current_device(operation));
}

int64_t workspace_bytes(const char* operation) {
  int bytes = 0;
  check(operation, cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, current_device(operation)));
  return int64_t(bytes) / 3 * 2;
}

void launch(const char* operation, const void* kernel, int64_t blocks, int threads, int64_t shared_bytes,
            void* stream, void** arguments) {
  if (blocks > 0x7fffffff)
    throw std::invalid_argument(std::string(operation) + ": the tensors are too large: " +
                                std::to_string(blocks) + " blocks, and a launch has at most 2147483647");
  if (shared_bytes > 48 << 10) allow_all_shared_memory(operation, kernel);  // so much needs no asking
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(operation, cudaLaunchKernelExC(&config, kernel, arguments));
}

}  // namespace vitdiv::cuda

namespace vitdiv {

int cuda_runtime_version() {
  int version = 0;
  cuda::check("cudaRuntimeGetVersion", cudaRuntimeGetVersion(&version));
  return version;
}

int cuda_driver_version() {
  int version = 0;
  cuda::check("cudaDriverGetVersion", cudaDriverGetVersion(&version));
  return version;
}

}  // namespace vitdiv
