// The Python module _C: loads libvitdiv, which it is linked to, and gives facts of the build.
#include <torch/csrc/utils/pybind.h>

#include "facts.h"
#include "kernels.def"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cpu_capability", &vitdiv::cpu_capability);
  m.def("num_threads", &vitdiv::num_threads);
#define VITDIV_ADD(operation, name, Args) kernels[#operation].push_back(#name);
  std::map<std::string, std::vector<std::string>> kernels;
  VITDIV_KERNELS(VITDIV_ADD)
  m.attr("kernels") = kernels;  // the operators by operation
  m.attr("built_for_torch") = VITDIV_TORCH_VERSION;
  const std::string architectures = VITDIV_CUDA_ARCHITECTURES;
  m.attr("with_cuda") = !architectures.empty();
  m.attr("cuda_architectures") = architectures;  // as CMake has them: with -real without PTX
#if defined(VITDIV_WITH_CUDA)
  m.def("cuda_runtime_version", &vitdiv::cuda_runtime_version);
  m.def("cuda_driver_version", &vitdiv::cuda_driver_version);
#endif
}
