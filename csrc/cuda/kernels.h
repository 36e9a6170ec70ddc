// The CUDA kernels' entry points. All pointers are to memory of the current device, except those of the
// arguments themselves. `stream` is a cudaStream_t. `scratch` is device memory of the size that the function
// of that name gives; it is free again when the stream has come so far. Launches return at once; what the
// driver refuses is thrown as std::runtime_error, what the kernels cannot do as std::invalid_argument.
#pragma once

#include "../kernels.def"

namespace vitdiv::cuda {

#define VITDIV_DECLARATIONS(operation, name, Args)      \
  int64_t name##_scratch(const Args& args); /* bytes */ \
  void name(const Args& args, void* scratch, void* stream);
VITDIV_KERNELS(VITDIV_DECLARATIONS)
#undef VITDIV_DECLARATIONS

// `saved` of pairwise_cosine has a layout of its own, the Triton kernels': so many int32, or null when there
// will be no backward; it need not be initialised. The other operations save nothing. The items of a set of
// vectors must be at equal distances in memory.
int64_t pairwise_cosine_saved_words(const CosineArgs& args);

}  // namespace vitdiv::cuda
