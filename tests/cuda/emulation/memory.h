// What the emulated kernels may read and write: memory/<operation>.h says it of an operation's kernels.
#pragma once

#include "../../../csrc/cuda/core/with_type.cuh"

namespace vitdiv {

inline int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::kDouble ? 8 : dtype == ScalarType::kFloat ? 4 : 2;
}
using cuda::accumulator_bytes;

// Kernels may read inputs, not write them, and must write outputs before they read them; null is neither.
inline void allow(const void* memory, int64_t bytes, bool output) {
  if (memory != nullptr && bytes > 0) emulation::allow(memory, bytes, output, !output);
}
inline void allow(const HeadsView& x, int64_t B, int64_t H, int64_t rows, int64_t width, bool output) {
  if (x.data == nullptr || B * H * rows * width == 0) return;
  const int64_t elements =
      1 + (B - 1) * x.stride_b + (H - 1) * x.stride_h + (rows - 1) * x.stride_n + (width - 1);
  allow(x.data, elements * bytes_of(x.dtype), output);
}

inline void allow(const BatchView& x, int64_t items, int64_t rows, int64_t width, bool output) {
  if (x.data == nullptr || rows * width == 0) return;
  for (int64_t l = 0; l < items; ++l)
    allow(static_cast<const char*>(x.data) + x.offset[l] * bytes_of(x.dtype),
          (1 + (rows - 1) * x.stride_n + width - 1) * bytes_of(x.dtype), output);
}

}  // namespace vitdiv
