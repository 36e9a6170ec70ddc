// All operators over compiled kernels: their schemas, and their registration for the kernels of a device.
#pragma once

#include <torch/library.h>

#include "kernels.def"
#include "operators/attention_gram.h"
#include "operators/pairwise_cosine.h"
#include "operators/pairwise_rows.h"
#include "operators/reattention.h"
#include "operators/two_gram.h"

namespace vitdiv {

// The same as in vitdiv_kernels/ops, for the Triton kernels; tests/ops/test_operators.py compares.
inline void define_operators(torch::Library& m) {
  const auto define = [&m](const auto& schemas) {
    for (const char* schema : schemas) m.def(schema);
  };
  define(kAttentionGram);
  define(kPairwiseCosine);
  define(kPairwiseRows);
  define(kReattention);
  define(kTwoGram);
}

template <class Device>
void register_operators(torch::Library& m) {
#define VITDIV_REGISTRATION(operation, name, Args) m.impl(#name, &name<Device>);
  VITDIV_KERNELS(VITDIV_REGISTRATION)
#undef VITDIV_REGISTRATION
}

}  // namespace vitdiv
