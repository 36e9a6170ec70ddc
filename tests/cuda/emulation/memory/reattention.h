// Of the reattention kernels.
#pragma once

#include "../../../../csrc/arguments/reattention.h"
#include "../memory.h"

namespace vitdiv {

inline int64_t gram_bytes(const ReattentionArgs& args) {
  return args.B * args.H * args.H * accumulator_bytes(args.q.dtype);
}
inline void allow_inputs(const ReattentionArgs& args) {
  allow(args.q, args.B, args.H, args.N, args.d, false);
  allow(args.k, args.B, args.H, args.M, args.d, false);
  allow(args.v, args.B, args.H, args.M, args.dv, false);
  const int64_t vector = args.H * accumulator_bytes(args.q.dtype);
  for (const void* matrix : {args.pre_mix, args.folded_mix}) allow(matrix, args.H * vector, false);
  for (const void* each : {args.pre_bias, args.folded_bias, args.norm_weight, args.norm_bias})
    allow(each, vector, false);
}
inline void allow_all(const ReattentionForward& args) {
  allow_inputs(args);
  allow(args.out, args.B, args.H, args.N, args.dv, true);
  allow(args.gram, gram_bytes(args), true);
}
inline void allow_all(const ReattentionBackward& args) {
  allow_inputs(args);
  allow(args.dout, args.B, args.H, args.N, args.dv, false);
  allow(args.dq, args.B, args.H, args.N, args.d, true);
  allow(args.dk, args.B, args.H, args.M, args.d, true);
  allow(args.dv_out, args.B, args.H, args.M, args.dv, true);
  const int64_t vector = args.H * accumulator_bytes(args.q.dtype), matrix = args.H * vector;
  allow(args.coupling, args.coupling_stride_b ? gram_bytes(args) : matrix, false);
  for (const void* each : {args.dpre_mix, args.dfolded_mix}) allow(each, matrix, true);
  for (const void* each : {args.dfolded_bias, args.dnorm_weight, args.dnorm_bias}) allow(each, vector, true);
}
inline void allow_all(const HeadDots& args) {
  allow(args.x, args.B, args.H, args.N, args.width, false);
  allow(args.y, args.B, args.H, args.N, args.width, false);
  allow(args.sums, args.H * accumulator_bytes(args.x.dtype), true);
}

}  // namespace vitdiv
