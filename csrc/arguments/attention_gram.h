// Arguments of the attention_gram kernels.
#pragma once

#include "views.h"

namespace vitdiv {

// One layer's queries and keys.
struct Layer {
  HeadsView q, k;
  int64_t H, d;
  double scale;
};

// Two layers' heads stand one after the other; layers[1].H is 0 for one layer.
struct GramArgs {
  int64_t B, N, M;
  Layer layers[2];
  int threads;
};

struct GramForward : GramArgs {
  void* gram;  // [B, H, H], centred
};

struct GramBackward : GramArgs {
  const void* coupling;  // [B, H, H]: dgram + its transpose
  HeadsView dq[2], dk[2];
};

}  // namespace vitdiv
