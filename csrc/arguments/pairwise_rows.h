// Arguments of the pairwise_rows kernels.
#pragma once

#include "views.h"

namespace vitdiv {

// Reductions along the rows of S = x_hat y_hat^T; y.data is null (and M = N) for pairs within x, without
// those of a row with itself. What is saved is the device's own affair.
struct RowsArgs {
  int64_t L, N, M, D;
  BatchView x, y;
  double scale, eps;
  int threads;
};

struct LogSumExpForward : RowsArgs {
  void* rows;   // [L, N]
  void* saved;  // null: no backward will come
};

struct LogSumExpBackward : RowsArgs {
  const void *drows, *rows;  // [L, N]
  const void* saved;
  BatchView dx, dy;
};

struct NearestForward : RowsArgs {
  int64_t* nearest;  // [L, N]
};

}  // namespace vitdiv
