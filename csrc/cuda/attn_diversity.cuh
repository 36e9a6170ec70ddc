// What the forward and the backward of attn_diversity share.
#pragma once

#include "attention.cuh"
#include "kernels.h"

namespace vitdiv::cuda {

inline int heads_of(const GramArgs& args) { return static_cast<int>(args.layers[0].H + args.layers[1].H); }

// call(T()) with the type of the queries
template <class Call>
auto with_type(const GramArgs& args, Call call) {
  switch (args.layers[0].q.dtype) {
    case ScalarType::kHalf: return call(half_t());
    case ScalarType::kBFloat16: return call(bf16_t());
    case ScalarType::kFloat: return call(float());
    default: return call(double());
  }
}

// For each query row and head its largest logit (in units of ln 2), the inverse of its sum of exponentials times
// MapNumbers::kScale, and the sum over keys of A dA: acc [3, B, H, N].
void gram_rows(const GramBackward& args, void* rows, void* stream);

}  // namespace vitdiv::cuda
