// Arguments of the two_gram kernels.
#pragma once

#include "views.h"

namespace vitdiv {

enum class GramPenalty { kSquare, kReluSquare, kReluTeacherSquare, kClampedTeacherSquare, kHinge, kProduct };

// Penalties of S = x x^T and T = y y^T, of unit rows if `normalise`. D2: the width of y, whose data is null
// if T is the identity. What is saved is the device's own affair.
struct TwoGramArgs {
  int64_t L, N, D, D2;
  BatchView x, y;
  GramPenalty penalty;
  double margin;
  bool normalise;
  double eps;
  int threads;
};

struct TwoGramForward : TwoGramArgs {
  void* sums;  // [L]
  void* saved;
  bool needs_dx, needs_dy;
};

struct TwoGramBackward : TwoGramArgs {
  const void* dsums;  // [L]
  const void* saved;
  BatchView dx, dy;
};

}  // namespace vitdiv
