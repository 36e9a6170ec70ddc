// What the forward and the backward of attention_gram share.
#pragma once

#include "../core/with_type.cuh"
#include "../kernels.h"
#include "attention.cuh"
#include "heads.cuh"

namespace vitdiv::cuda {

inline int heads_of(const GramArgs& args) { return static_cast<int>(args.layers[0].H + args.layers[1].H); }
inline ScalarType type_of(const GramArgs& args) { return args.layers[0].q.dtype; }

// For each query row and head its largest logit (in units of ln 2), the inverse of its sum of exponentials
// times MapNumbers::kScale, and the sum over keys of A dA: acc [3, B, H, N].
void gram_rows(const GramBackward& args, void* rows, void* stream);

}  // namespace vitdiv::cuda
