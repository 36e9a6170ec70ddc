// What the library tells of this machine; the Python module _C hands it on.
#pragma once

#include <string>

namespace vitdiv {

__attribute__((visibility("default"))) std::string cpu_capability();
__attribute__((visibility("default"))) int num_threads();
// As CUDA writes them, 13000 is 13.0. Only where CUDA kernels were compiled.
__attribute__((visibility("default"))) int cuda_runtime_version();
__attribute__((visibility("default"))) int cuda_driver_version();  // the latest that it runs; 0: no driver

}  // namespace vitdiv
