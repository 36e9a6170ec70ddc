// Sums and maxima over the lanes of a warp and over blocks.
#pragma once

#include "platform.cuh"

namespace vitdiv::cuda {

DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE double larger(double a, double b) { return fmax(a, b); }
DEVICE float square_root(float x) { return sqrtf(x); }
DEVICE double square_root(double x) { return sqrt(x); }

// Over the four lanes of a quad, which share a row of a tile: every lane gets the result.
template <class T>
DEVICE T quad_sum(T x) {
  x += warp_shuffle_xor(x, 1);
  return x + warp_shuffle_xor(x, 2);
}
template <class T>
DEVICE T quad_max(T x) {
  x = larger(x, warp_shuffle_xor(x, 1));
  return larger(x, warp_shuffle_xor(x, 2));
}

// Over all lanes of the warp.
template <class T>
DEVICE T warp_max(T x) {
  UNROLLED_FOR (int mask = 16; mask > 0; mask /= 2) x = larger(x, warp_shuffle_xor(x, mask));
  return x;
}

template <class T>
DEVICE T warp_sum(T x) {
  UNROLLED_FOR (int mask = 16; mask > 0; mask /= 2) x += warp_shuffle_xor(x, mask);
  return x;
}

// Over all threads of the block, of numbers not below 0; every thread gets the result. `memory` holds a
// number for each warp.
template <class T>
DEVICE T block_max(T x, Shared<T> memory) {
  x = warp_max(x);
  sync_block();  // the memory may still be in use
  if ((thread_x() & 31) == 0) memory.st(thread_x() >> 5, x);
  sync_block();
  T top = 0;
  for (int w = 0; w < threads() >> 5; ++w) top = larger(top, memory.ld(w));
  return top;
}

// Over all threads of the block, in float64; the result is thread 0's. `memory` holds a number for each warp.
template <class T>
DEVICE double block_sum(T x, Shared<double> memory) {
  const double sum = warp_sum(static_cast<double>(x));
  sync_block();  // the memory may still be in use
  if ((thread_x() & 31) == 0) memory.st(thread_x() >> 5, sum);
  sync_block();
  double total = 0;
  if (thread_x() == 0)
    for (int w = 0; w < threads() >> 5; ++w) total += memory.ld(w);
  return total;
}

// sums[i, x] = sum over parts p of partial[i, p, x], each i with `parts` parts of `size` numbers; in float64
// and always in the same order.
template <class T>
KERNEL LAUNCH_BOUNDS(256, 1)
    sum_parts(Global<const T> partial, Global<T> sums, int64_t count, int parts, int size) {
  const int64_t at = int64_t(block_x()) * threads() + thread_x();
  if (at >= count * size) return;
  const int64_t first = at / size * parts * size + at % size;
  double sum = 0;
  for (int p = 0; p < parts; ++p) sum += partial.ld(first + int64_t(p) * size);
  sums.st(at, static_cast<T>(sum));
}

template <class T>
void launch_sum_parts(const char* operation, const T* partial, T* sums, int64_t count, int parts, int size,
                      void* stream) {
  launch(operation, sum_parts<T>, (count * size + 255) / 256, 256, 0, stream, Global<const T>{partial},
         Global<T>{sums}, count, parts, size);
}

}  // namespace vitdiv::cuda
