// Of the attention_gram kernels.
#pragma once

#include "../../../../csrc/arguments/attention_gram.h"
#include "../memory.h"

namespace vitdiv {

inline void allow_inputs(const GramArgs& args) {
  for (const Layer& layer : args.layers) {
    allow(layer.q, args.B, layer.H, args.N, layer.d, false);
    allow(layer.k, args.B, layer.H, args.M, layer.d, false);
  }
}
inline int64_t gram_bytes(const GramArgs& args) {
  const int64_t H = args.layers[0].H + args.layers[1].H;
  return args.B * H * H * accumulator_bytes(args.layers[0].q.dtype);
}
inline void allow_all(const GramForward& args) {
  allow_inputs(args);
  allow(args.gram, gram_bytes(args), true);
}
inline void allow_all(const GramBackward& args) {
  allow_inputs(args);
  allow(args.coupling, gram_bytes(args), false);
  for (int l = 0; l < 2; ++l) {
    allow(args.dq[l], args.B, args.layers[l].H, args.N, args.layers[l].d, true);
    allow(args.dk[l], args.B, args.layers[l].H, args.M, args.layers[l].d, true);
  }
}

}  // namespace vitdiv
