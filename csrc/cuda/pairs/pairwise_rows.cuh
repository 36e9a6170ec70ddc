// What the kernels of pairwise_rows share.
#pragma once

#include "pairwise_cosine.cuh"

namespace vitdiv::cuda {

inline CosineArgs vectors_of(const RowsArgs& args) {
  CosineArgs vectors{};
  vectors.L = args.L, vectors.N = args.N, vectors.M = args.M, vectors.D = args.D;
  vectors.x = args.x, vectors.y = args.y;
  vectors.eps = args.eps;
  return vectors;
}

inline void check_sizes(const RowsArgs& args) {
  if (args.N < 1 || args.M < 1 || args.D < 1)
    throw std::invalid_argument(
        "pairwise_rows: the CUDA kernels need at least one vector of at least one feature");
}

}  // namespace vitdiv::cuda
