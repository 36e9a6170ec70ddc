// What the arguments of the compiled kernels have in common, the same for CPU and CUDA: plain structs, no
// torch. Those of an operation are in the file of its name.
//
// Sizes: B images, H heads, N queries, M keys, d head width. "acc" is the arithmetic's type: double for
// kDouble, else float. Arrays without a stride are contiguous, of type acc. A null pointer is an absent
// argument or an output that nobody asked for. `threads` is for the CPU.
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

}  // namespace vitdiv
