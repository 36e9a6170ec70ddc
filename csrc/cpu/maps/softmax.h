// Softmax of the rows of a map and its gradient. A row has M values and room for `padded`, whole vectors.
#pragma once

#include "../core/simd.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

// The largest of sign * row.
template <class T>
VITDIV_INLINE T largest(int64_t M, const T* row, T sign) {
  constexpr int V = kLanes<T>;
  const int64_t whole = M / V * V;
  const Vec<T> lowest = broadcast<T>(-T(__builtin_inff()));
  Vec<T> top = lowest, other = lowest;  // two, for the latency of a comparison
  int64_t j = 0;
  for (; j + 2 * V <= whole; j += 2 * V) {
    top = larger<T>(load(row + j) * sign, top);
    other = larger<T>(load(row + j + V) * sign, other);
  }
  if (j < whole) top = larger<T>(load(row + j) * sign, top);
  if (whole < M) other = larger<T>(first_lanes<T>(load(row + whole) * sign, M - whole, lowest[0]), other);
  top = larger<T>(top, other);
  T max = top[0];
  for (int i = 1; i < V; i++) max = top[i] > max ? top[i] : max;
  return max;
}

// row = exp2(factor * (row - row_max)) in Count vectors, each step for all of them: the chain of one is
// longer than what a core looks ahead. Returns their sum.
template <class T, int Count>
VITDIV_INLINE Vec<T> exponentials_of(T* row, T row_max, T factor) {
  constexpr int V = kLanes<T>;
  Vec<T> e[Count];
#pragma GCC unroll 4
  for (int i = 0; i < Count; i++) e[i] = (load(row + i * V) - row_max) * factor;
  exp2_nonpositive<T, Count>(e);
  Vec<T> total = e[0];
#pragma GCC unroll 4
  for (int i = 0; i < Count; i++) {
    store(row + i * V, e[i]);
    if (i) total += e[i];
  }
  return total;
}

// row = exp2(factor * (row - row_max)), its padding 0; returns the sums by lane.
template <class T>
VITDIV_INLINE Vec<T> exponentials(int64_t M, int64_t padded, T* row, T row_max, T factor) {
  constexpr int V = kLanes<T>, kCount = 4;
  const int64_t whole = M / V * V;
  Vec<T> total = {};
  int64_t j = 0;
  for (; j + kCount * V <= whole; j += kCount * V)
    total += exponentials_of<T, kCount>(row + j, row_max, factor);
  for (; j < whole; j += V) total += exponentials_of<T, 1>(row + j, row_max, factor);
  if (j < M) {
    exponentials_of<T, 1>(row + j, row_max, factor);
    const Vec<T> e = first_lanes<T>(load(row + j), M - j, T(0));
    total += e;
    store(row + j, e);
    j += V;
  }
  for (; j < padded; j += V) store(row + j, Vec<T>{});
  return total;
}

// Each of n rows becomes exp(scale * row - largest), its padding 0; row_scales[r] is what makes it the
// softmax, one over its sum. NaN and infinities come out as torch.softmax gives them.
template <class T>
void softmax_rows_unscaled(int64_t n, int64_t M, int64_t padded, T* rows, T scale, T* row_scales) {
  // the largest scaled logit is at the largest logit only for scale >= 0
  const T sign = scale < 0 ? T(-1) : T(1), factor = scale * T(1.4426950408889634074);
  // a few rows at a time, each step for all of them, so that the sums across lanes of one row do not wait for
  // each other
  constexpr int kRows = 4;
  T row_maxes[kRows];
  Vec<T> totals[kRows];
  for (int64_t r0 = 0; r0 < n; r0 += kRows) {
    const int count = int(min64(kRows, n - r0));
    for (int r = 0; r < count; r++) row_maxes[r] = largest(M, rows + (r0 + r) * padded, sign) * sign;
    for (int r = 0; r < count; r++)
      totals[r] = exponentials(M, padded, rows + (r0 + r) * padded, row_maxes[r], factor);
    for (int r = 0; r < count; r++) row_scales[r0 + r] = T(1) / sum_lanes<T>(totals[r]);
  }
}

// d, the gradient of the probabilities a, becomes factor * that of the logits. The padding of a is 0.
template <class T>
VITDIV_INLINE void softmax_row_bwd(int64_t padded, const T* a, T* d, T factor) {
  constexpr int V = kLanes<T>;
  Vec<T> total = {}, other = {};
  int64_t j = 0;
  for (; j + 2 * V <= padded; j += 2 * V) {
    total += load(a + j) * load(d + j);
    other += load(a + j + V) * load(d + j + V);
  }
  if (j < padded) total += load(a + j) * load(d + j);
  const T row_dot = sum_lanes<T>(total + other);
  for (j = 0; j < padded; j += V) store(d + j, load(a + j) * (load(d + j) - row_dot) * factor);
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
