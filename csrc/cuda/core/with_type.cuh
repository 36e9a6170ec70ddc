// From the type of a tensor's numbers, known when a program runs, to that of a template.
#pragma once

#include "../../arguments/views.h"
#include "platform.cuh"

namespace vitdiv::cuda {

// Of the arithmetic's type.
inline int64_t accumulator_bytes(ScalarType dtype) { return dtype == ScalarType::kDouble ? 8 : 4; }

// call(T())
template <class Call>
auto with_type(ScalarType dtype, Call call) {
  switch (dtype) {
    case ScalarType::kHalf: return call(half_t());
    case ScalarType::kBFloat16: return call(bf16_t());
    case ScalarType::kFloat: return call(float());
    default: return call(double());
  }
}

}  // namespace vitdiv::cuda
