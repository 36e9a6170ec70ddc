// Softmax of a row and its gradient. A row has M values and room for `padded`, whole vectors.
#pragma once

#include "simd.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

// row = exp(scale * row - largest), its padding 0; returns what makes it the softmax, one over its sum. NaN and infinities
// come out as torch.softmax gives them.
template <class T>
T softmax_row_unscaled(int64_t M, int64_t padded, T* row, T scale) {
  constexpr int V = kLanes<T>;
  const int64_t whole = M / V * V, tail = M - whole;
  const T infinity = T(__builtin_inff());
  // the largest scaled logit is at the largest logit only for scale >= 0
  const bool negative = scale < 0;
  const T sign = negative ? T(-1) : T(1);
  Vec<T> top = broadcast<T>(-infinity);
  for (int64_t j = 0; j < whole; j += V) {
    const Vec<T> z = load(row + j) * sign;
    top = z > top ? z : top;
  }
  if (tail) {
    const Vec<T> z = first_lanes<T>(load(row + whole) * sign, tail, -infinity);
    top = z > top ? z : top;
  }
  T max = -infinity;
  for (int i = 0; i < V; i++) max = top[i] > max ? top[i] : max;
  const T factor = scale * T(1.4426950408889634074), shift = max * sign;
  Vec<T> total = {}, other = {};  // two, for the latency of an addition
  int64_t j = 0;
  for (; j + 2 * V <= whole; j += 2 * V) {
    const Vec<T> e0 = exp2_nonpositive<T>((load(row + j) - shift) * factor);
    const Vec<T> e1 = exp2_nonpositive<T>((load(row + j + V) - shift) * factor);
    total += e0;
    other += e1;
    store(row + j, e0);
    store(row + j + V, e1);
  }
  if (j < whole) {
    const Vec<T> e = exp2_nonpositive<T>((load(row + j) - shift) * factor);
    total += e;
    store(row + j, e);
  }
  total += other;
  if (tail) {
    const Vec<T> e = first_lanes<T>(exp2_nonpositive<T>((load(row + whole) - shift) * factor), tail, T(0));
    total += e;
    store(row + whole, e);
  }
  for (j = round_up(M, V); j < padded; j += V) store(row + j, Vec<T>{});
  return T(1) / sum_lanes<T>(total);
}

// row = softmax(scale * row); the padding is set to `pad`.
template <class T>
void softmax_row(int64_t M, int64_t padded, T* row, T scale, T pad) {
  constexpr int V = kLanes<T>;
  const T norm = softmax_row_unscaled(M, padded, row, scale);
  const int64_t whole = M / V * V;
  for (int64_t j = 0; j < whole; j += V) store(row + j, load(row + j) * norm);
  if (whole < M) store(row + whole, first_lanes<T>(load(row + whole) * norm, M - whole, pad));
  for (int64_t j = round_up(M, V); j < padded; j += V) store(row + j, broadcast<T>(pad));
}

// d, the gradient of the probabilities a, becomes factor * that of the logits. The padding of a is 0.
template <class T>
void softmax_row_bwd(int64_t padded, const T* a, T* d, T factor) {
  Vec<T> acc = {};
  for (int64_t j = 0; j < padded; j += kLanes<T>) acc += load(a + j) * load(d + j);
  const T delta = sum_lanes<T>(acc);
  for (int64_t j = 0; j < padded; j += kLanes<T>) store(d + j, load(a + j) * (load(d + j) - delta) * factor);
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
