// Arguments of the reattention kernels.
#pragma once

#include "views.h"

namespace vitdiv {

// Y = folded_mix A + folded_bias, or with `centred` folded_mix (A - 1/M) + folded_bias; then layer norm over
// heads when norm_weight is given. folded_bias may be null.
struct ReattentionArgs {
  int64_t B, H, N, M, d, dv;
  HeadsView q, k, v;
  double scale;
  const void *pre_mix, *pre_bias;        // [H, H], [H]
  const void *folded_mix, *folded_bias;  // [H, H], [H]
  bool centred;
  const void *norm_weight, *norm_bias;  // [H], [H]
  double eps;
  int threads;
};

struct ReattentionForward : ReattentionArgs {
  HeadsView out;  // null: only gram
  void* gram;     // [B, H, H], centred
};

struct ReattentionBackward : ReattentionArgs {
  HeadsView dout, dq, dk, dv_out;
  const void* coupling;       // [B, H, H] or null: dgram + its transpose
  int64_t coupling_stride_b;  // 0 when all images share one
  void *dpre_mix, *dfolded_mix, *dfolded_bias, *dnorm_weight, *dnorm_bias;
};

// sums[h] = sum over images and rows of x . y
struct HeadDots {
  int64_t B, H, N, width;
  HeadsView x, y;
  void* sums;  // [H]
  int threads;
};

}  // namespace vitdiv
