// What couples the heads of a tile of attention maps. A tile holds `rows` query rows of all heads, [H, rows, padded keys];
// to these functions it is a matrix [H, L] whose rows are `stride` apart.
#pragma once

#include "gemm.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

constexpr int64_t kMaxHeads = 256;

// out[g] (+)= bias[g] + sum_h weight[g, h] (in[h] - shift) for Rows heads g; L is a whole number of vectors.
template <class T, int Rows>
__attribute__((noinline)) void mix_kernel(int64_t H, int64_t L, const T* weight, const T* bias, T shift,
                                          const T* in, int64_t in_stride, T* out, int64_t out_stride,
                                          bool accumulate) {
  for (int64_t x = 0; x < L; x += kPanel<T>) {
    const int vectors = L - x > kLanes<T> ? 2 : 1;
    // the second vector of a last single one repeats the first, so that the loop below stays branch-free
    const int64_t second = vectors == 2 ? kLanes<T> : 0;
    Vec<T> acc[Rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      acc[r][0] = accumulate ? load(out + r * out_stride + x) : broadcast(bias ? bias[r] : T(0));
      acc[r][1] = accumulate ? load(out + r * out_stride + x + second) : acc[r][0];
    }
    for (int64_t h = 0; h < H; h++) {
      const Vec<T> b0 = load(in + h * in_stride + x) - shift,
                   b1 = load(in + h * in_stride + x + second) - shift;
#pragma GCC unroll 16
      for (int r = 0; r < Rows; r++) {
        const T w = weight[r * H + h];
        acc[r][0] += w * b0;
        acc[r][1] += w * b1;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      store(out + r * out_stride + x, acc[r][0]);
      store(out + r * out_stride + x + second, acc[r][1]);
    }
  }
}

template <class T, int Rows = kMaxRows>
VITDIV_INLINE void mix_rows(int64_t rows, int64_t H, int64_t L, const T* weight, const T* bias, T shift,
                            const T* in, int64_t in_stride, T* out, int64_t out_stride, bool accumulate) {
  if constexpr (Rows > 1) {
    if (rows < Rows)
      return mix_rows<T, Rows - 1>(rows, H, L, weight, bias, shift, in, in_stride, out, out_stride,
                                   accumulate);
  }
  mix_kernel<T, Rows>(H, L, weight, bias, shift, in, in_stride, out, out_stride, accumulate);
}

// out[g] (+)= bias[g] + sum_h weight[g, h] (in[h] - shift). in and out may be the same tile (then not accumulating).
template <class T>
void mix(int64_t H, int64_t L, const T* weight, const T* bias, T shift, const T* in, T* out, int64_t stride,
         bool accumulate = false) {
  const RowBlocks blocks(H);
  const bool in_place = in == out && blocks.count > 1;
  if (!in_place) {  // one row block reads all heads of a column before it writes any
    for (int64_t i = 0; i < blocks.count; i++) {
      const int64_t r = blocks.begin(i);
      mix_rows<T>(blocks.size(i), H, L, weight + r * H, bias ? bias + r : nullptr, shift, in, stride,
                  out + r * stride, stride, accumulate);
    }
    return;
  }
  alignas(64) T column[kMaxHeads * kPanel<T>];
  const int64_t columns = kMaxHeads / round_up(H, 64) * kPanel<T>;
  for (int64_t x = 0; x < L; x += columns) {
    const int64_t width = min64(columns, L - x);
    for (int64_t h = 0; h < H; h++)
      memcpy(column + h * columns, in + h * stride + x, size_t(width) * sizeof(T));
    for (int64_t i = 0; i < blocks.count; i++) {
      const int64_t r = blocks.begin(i);
      mix_rows<T>(blocks.size(i), H, width, weight + r * H, bias ? bias + r : nullptr, shift, column, columns,
                  out + r * stride + x, stride, false);
    }
  }
}

// The same for `rows` rows of maps whose softmax is still to be scaled: in[h] stands for factors[h, row] in[h]. In place.
// That saves a pass over the tile in L2, and the copy that working in place needs takes the factors and the shift along.
template <class T>
void mix_unscaled(int64_t H, int64_t rows, int64_t padded, const T* weight, const T* bias, T shift,
                  const T* factors, T* maps, int64_t stride) {
  alignas(64) T column[kMaxHeads * kPanel<T>];
  const int64_t columns = kMaxHeads * kPanel<T> / H / kLanes<T> * kLanes<T>;
  const RowBlocks blocks(H);
  for (int64_t row = 0; row < rows; row++)
    for (int64_t x = 0; x < padded; x += columns) {
      const int64_t width = min64(columns, padded - x);
      T* const begin = maps + row * padded + x;
      for (int64_t h = 0; h < H; h++) {
        const T factor = factors[h * rows + row];
        for (int64_t j = 0; j < width; j += kLanes<T>)
          store(column + h * columns + j, load(begin + h * stride + j) * factor - shift);
      }
      for (int64_t i = 0; i < blocks.count; i++) {
        const int64_t g = blocks.begin(i);
        mix_rows<T>(blocks.size(i), H, width, weight + g * H, bias ? bias + g : nullptr, T(0), column,
                    columns, begin + g * stride, stride, false);
      }
    }
}

// gram[g * H + h] += sum_x (a[g][x] - shift_a) (b[h][x] - shift_b); symmetric: only blocks with g <= h are computed and
// the caller mirrors them.
template <class T>
void gram(int64_t G, int64_t H, int64_t L, const T* a, T shift_a, const T* b, T shift_b, int64_t stride,
          double* gram, bool symmetric) {
  constexpr int kRows = kMaxRows > 8 ? 4 : 2, kCols = 4;
  for (int64_t g = 0; g < G; g += kRows)
    for (int64_t h = symmetric ? g / kCols * kCols : 0; h < H; h += kCols) {
      // a block that sticks out repeats the last head and drops the result
      const T *ar[kRows], *br[kCols];
      for (int i = 0; i < kRows; i++) ar[i] = a + min64(g + i, G - 1) * stride;
      for (int j = 0; j < kCols; j++) br[j] = b + min64(h + j, H - 1) * stride;
      Vec<T> acc[kRows][kCols] = {};
      for (int64_t x = 0; x < L; x += kLanes<T>) {
        Vec<T> bv[kCols];
#pragma GCC unroll 4
        for (int j = 0; j < kCols; j++) bv[j] = load(br[j] + x) - shift_b;
#pragma GCC unroll 4
        for (int i = 0; i < kRows; i++) {
          const Vec<T> av = load(ar[i] + x) - shift_a;
#pragma GCC unroll 4
          for (int j = 0; j < kCols; j++) acc[i][j] += av * bv[j];
        }
      }
      for (int i = 0; i < kRows && g + i < G; i++)
        for (int j = 0; j < kCols && h + j < H; j++)
          gram[(g + i) * H + h + j] += double(sum_lanes<T>(acc[i][j]));
    }
}

template <class T>
double sum(int64_t L, const T* x) {
  Vec<T> acc = {};
  for (int64_t i = 0; i < L; i += kLanes<T>) acc += load(x + i);
  return double(sum_lanes<T>(acc));
}

template <class T>
double sum_products(int64_t L, const T* x, const T* y) {
  Vec<T> acc = {};
  for (int64_t i = 0; i < L; i += kLanes<T>) acc += load(x + i) * load(y + i);
  return double(sum_lanes<T>(acc));
}

template <class T>
VITDIV_INLINE Vec<T> reciprocal_sqrt(Vec<T> v) {
  for (int i = 0; i < kLanes<T>; i++)
    v[i] = T(1) / (sizeof(T) == 4 ? T(__builtin_sqrtf(float(v[i]))) : T(__builtin_sqrt(v[i])));
  return v;
}

// Layer norm over heads at each position: out = weight * normalized + bias. normalized may be x itself; rstd and out may
// be null; out may be x when normalized is null.
template <class T>
void layer_norm_heads(int64_t H, int64_t L, const T* x, T* normalized, T* rstd, T* out, int64_t stride,
                      const T* weight, const T* bias, T eps) {
  const T inv_h = T(1) / T(H);
  for (int64_t i = 0; i < L; i += kLanes<T>) {
    Vec<T> mean = {}, var = {};
    for (int64_t h = 0; h < H; h++) mean += load(x + h * stride + i);
    mean *= inv_h;
    for (int64_t h = 0; h < H; h++) {
      const Vec<T> c = load(x + h * stride + i) - mean;
      var += c * c;
    }
    const Vec<T> r = reciprocal_sqrt<T>(var * inv_h + eps);
    if (rstd) store(rstd + i, r);
    for (int64_t h = 0; h < H; h++) {
      const Vec<T> n = (load(x + h * stride + i) - mean) * r;
      if (normalized) store(normalized + h * stride + i, n);
      if (out) store(out + h * stride + i, n * weight[h] + bias[h]);
    }
  }
}

// dy, the gradient of the layer norm's output, becomes that of its input.
template <class T>
void layer_norm_heads_bwd(int64_t H, int64_t L, const T* normalized, const T* rstd, T* dy, int64_t stride,
                          const T* weight) {
  const T inv_h = T(1) / T(H);
  for (int64_t i = 0; i < L; i += kLanes<T>) {
    Vec<T> mean = {}, projection = {};
    for (int64_t h = 0; h < H; h++) {
      const Vec<T> dn = load(dy + h * stride + i) * weight[h];
      mean += dn;
      projection += dn * load(normalized + h * stride + i);
    }
    mean *= inv_h;
    projection *= inv_h;
    const Vec<T> r = load(rstd + i);
    for (int64_t h = 0; h < H; h++) {
      const Vec<T> dn = load(dy + h * stride + i) * weight[h];
      store(dy + h * stride + i, r * (dn - mean - load(normalized + h * stride + i) * projection));
    }
  }
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
