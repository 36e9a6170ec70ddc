// Of the pairwise_cosine kernels.
#pragma once

#include "../../../../csrc/cuda/kernels.h"
#include "../memory.h"

namespace vitdiv {

inline void allow_inputs(const CosineArgs& args) {
  allow(args.x, args.L, args.N, args.D, false);
  allow(args.y, args.L, args.M, args.D, false);
}
inline void allow_all(const CosineForward& args) {
  allow_inputs(args);
  allow(args.sums, args.L * accumulator_bytes(args.x.dtype), true);
  allow(args.saved, 4 * cuda::pairwise_cosine_saved_words(args), true);
}
inline void allow_all(const CosineBackward& args) {
  allow_inputs(args);
  allow(args.dsums, args.L * accumulator_bytes(args.x.dtype), false);
  allow(args.saved, 4 * cuda::pairwise_cosine_saved_words(args), false);
  allow(args.dx, args.L, args.N, args.D, true);
  allow(args.dy, args.L, args.M, args.D, true);
}

}  // namespace vitdiv
