// The arguments of the compiled kernels, the same for CPU and CUDA: plain structs, no torch.
//
// Sizes: B images, H heads, N queries, M keys, d head width. "acc" is the arithmetic's type: double for kDouble, else
// float. Arrays without a stride are contiguous, of type acc. A null pointer is an absent argument or an output that
// nobody asked for. `threads` is for the CPU.
#pragma once

#include <cstdint>

namespace vitdiv {

enum class ScalarType { kFloat, kDouble, kHalf, kBFloat16 };

// [B, H, rows, width], in elements; the last stride is 1.
struct HeadsView {
  void* data;
  ScalarType dtype;
  int64_t stride_b, stride_h, stride_n;
};

// Rows [N, D] of each item of a batch; item l begins offset[l] elements after data.
struct BatchView {
  void* data;
  ScalarType dtype;
  const int64_t* offset;
  int64_t stride_n;
};

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

// Reductions along the rows of S = x_hat y_hat^T; y.data is null (and M = N) for pairs within x, without those of a row with
// itself. What is saved is the device's own affair.
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

enum class GramPenalty { kSquare, kReluSquare, kReluTeacherSquare, kClampedTeacherSquare, kHinge, kProduct };

// Penalties of S = x x^T and T = y y^T, of unit rows if `normalise`. E: the width of y, whose data is null if T is the
// identity. What is saved is the device's own affair.
struct TwoGramArgs {
  int64_t L, N, D, E;
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

// Y = mix A + bias, or with `centred` mix (A - 1/M) + bias; then layer norm over heads when norm_weight is given. bias may
// be null.
struct ReattentionArgs {
  int64_t B, H, N, M, d, dv;
  HeadsView q, k, v;
  double scale;
  const void *pre_mix, *pre_bias;  // [H, H], [H]
  const void *mix, *bias;          // [H, H], [H]
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
  void *dpre_mix, *dmix, *dbias, *dnorm_weight, *dnorm_bias;
};

// sums[h] = sum over images and rows of x . y
struct HeadDots {
  int64_t B, H, N, width;
  HeadsView x, y;
  void* sums;  // [H]
  int threads;
};

}  // namespace vitdiv
