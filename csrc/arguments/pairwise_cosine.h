// Arguments of the pairwise_cosine kernels.
#pragma once

#include "views.h"

namespace vitdiv {

enum class Penalty { kSigned, kAbs, kSquare, kRelu };

struct CosineArgs {
  int64_t L, N, M, D;  // L items; y.data is null (and M = N) for pairs within x
  BatchView x, y;
  Penalty penalty;
  bool include_self;
  double eps;
  int threads;
};

// saved: kSigned: acc [1 or 2, L, D], the sums of the unit rows of x (and of y); kAbs, kRelu: sign words (see
// pairwise_cosine.cpp); kSquare: nothing.
struct CosineForward : CosineArgs {
  void* sums;  // [L]
  void* saved;
};

struct CosineBackward : CosineArgs {
  const void* dsums;  // [L]
  const void* saved;
  BatchView dx, dy;
};

}  // namespace vitdiv
