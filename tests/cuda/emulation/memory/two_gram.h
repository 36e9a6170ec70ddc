// Of the two_gram kernels.
#pragma once

#include "../../../../csrc/arguments/two_gram.h"
#include "../memory.h"

namespace vitdiv {

inline void allow_inputs(const TwoGramArgs& args) {
  allow(args.x, args.L, args.N, args.D, false);
  allow(args.y, args.L, args.N, args.D2, false);
}
inline void allow_all(const TwoGramForward& args) {
  allow_inputs(args);
  allow(args.sums, args.L * accumulator_bytes(args.x.dtype), true);
}
inline void allow_all(const TwoGramBackward& args) {
  allow_inputs(args);
  allow(args.dsums, args.L * accumulator_bytes(args.x.dtype), false);
  allow(args.dx, args.L, args.N, args.D, true);
  allow(args.dy, args.L, args.N, args.D2, true);
}

}  // namespace vitdiv
