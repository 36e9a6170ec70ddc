// Of the pairwise_rows kernels.
#pragma once

#include "../../../../csrc/arguments/pairwise_rows.h"
#include "../memory.h"

namespace vitdiv {

inline void allow_inputs(const RowsArgs& args) {
  allow(args.x, args.L, args.N, args.D, false);
  allow(args.y, args.L, args.M, args.D, false);
}
inline void allow_all(const LogSumExpForward& args) {
  allow_inputs(args);
  allow(args.rows, args.L * args.N * accumulator_bytes(args.x.dtype), true);
}
inline void allow_all(const LogSumExpBackward& args) {
  allow_inputs(args);
  for (const void* rows : {args.drows, args.rows})
    allow(rows, args.L * args.N * accumulator_bytes(args.x.dtype), false);
  allow(args.dx, args.L, args.N, args.D, true);
  allow(args.dy, args.L, args.M, args.D, true);
}
inline void allow_all(const NearestForward& args) {
  allow_inputs(args);
  allow(args.nearest, args.L * args.N * sizeof(int64_t), true);
}

}  // namespace vitdiv
