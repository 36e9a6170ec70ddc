// What couples the heads of a tile of attention maps. A tile holds `rows` query rows of all heads, [H, rows,
// padded keys]; to these functions it is a matrix [H, L] whose rows are `stride` apart.
#pragma once

#include "../core/gemm.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

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

// Columns of all heads that stay in L1 from one step to the next.
template <class T>
VITDIV_INLINE int64_t chunk_columns(int64_t H) {
  constexpr int64_t kChunkBytes = 16 << 10, kFewest = 64;
  return max64(kChunkBytes / int64_t(sizeof(T)) / max64(H, 1), kFewest) / kPanel<T> * kPanel<T>;
}

// use(row, rows, begin, width) for the columns begin ... begin + width of a tile [H, n, padded]: whole rows,
// as many as a chunk has room for, or where one is longer its pieces in turn, with rows = 1.
template <class T, class Use>
VITDIV_INLINE void for_chunks(int64_t H, int64_t n, int64_t padded, const Use& use) {
  const int64_t columns = chunk_columns<T>(H), group = max64(columns / padded, 1);
  for (int64_t row = 0; row < n; row += group) {
    const int64_t rows = min64(group, n - row), end = (row + rows) * padded;
    for (int64_t x = row * padded; x < end; x += columns) use(row, rows, x, min64(columns, end - x));
  }
}

// out[g] (+)= bias[g] + sum_h weight[g, h] (in[h] - shift). in and out are apart, or there is but one block
// of heads.
template <class T>
void mix(int64_t H, int64_t L, const T* weight, const T* bias, T shift, const T* in, int64_t in_stride,
         T* out, int64_t out_stride, bool accumulate = false) {
  const RowBlocks blocks(H);
  const int64_t columns = chunk_columns<T>(H);
  for (int64_t x = 0; x < L; x += columns)
    for (int64_t i = 0; i < blocks.count; i++) {
      const int64_t r = blocks.begin(i);
      mix_rows<T>(blocks.size(i), H, min64(columns, L - x), weight + r * H, bias ? bias + r : nullptr, shift,
                  in + x, in_stride, out + r * out_stride + x, out_stride, accumulate);
    }
}

// The same in place, through chunk [H, chunk_columns].
template <class T>
void mix_in_place(int64_t H, int64_t L, const T* weight, const T* bias, T* tile, int64_t stride, T* chunk) {
  const int64_t columns = chunk_columns<T>(H);
  for (int64_t x = 0; x < L; x += columns) {
    const int64_t width = min64(columns, L - x);
    for (int64_t h = 0; h < H; h++)
      memcpy(chunk + h * columns, tile + h * stride + x, size_t(width) * sizeof(T));
    mix<T>(H, width, weight, bias, T(0), chunk, columns, tile + x, stride);
  }
}

// A chunk of maps less their mean, its padding 0, into chunk [H, columns]. The maps' softmax is still to be
// scaled, by row_scales[h, row]; with `keep` they are.
template <class T>
void centre(int64_t H, int64_t n, int64_t M, int64_t padded, int64_t row, int64_t rows, int64_t x,
            int64_t width, const T* row_scales, T mean, T* maps, int64_t stride, T* chunk, int64_t columns,
            bool keep) {
  constexpr int V = kLanes<T>;
  if (rows > 1) width = padded;
  for (int64_t h = 0; h < H; h++)
    for (int64_t r = row; r < row + rows; r++) {
      const int64_t begin = rows > 1 ? r * padded : x, valid = min64(width, M - (begin - r * padded));
      const T factor = row_scales[h * n + r];
      T *in = maps + h * stride + begin, *out = chunk + h * columns + begin - x;
      int64_t j = 0;
      if (keep)
        for (; j + V <= valid; j += V) {
          const Vec<T> v = load(in + j) * factor;
          store(in + j, v);
          store(out + j, v - mean);
        }
      else
        for (; j + V <= valid; j += V) store(out + j, load(in + j) * factor - mean);
      if (j < valid) {
        const Vec<T> v = load(in + j) * factor;
        if (keep) store(in + j, first_lanes<T>(v, valid - j, T(0)));
        store(out + j, first_lanes<T>(v - mean, valid - j, T(0)));
        j += V;
      }
      for (; j < width; j += V) store(out + j, Vec<T>{});
    }
}

// Sums over columns of products of heads, grown a chunk at a time: each in a vector of its own, so that only
// the end adds up lanes.
template <class T, bool Symmetric>
struct PairSums {
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr int kRows = 4, kCols = 6;
#else
  static constexpr int kRows = 2,
                       kCols = 6;  // 12 sums: as many as keep the multipliers busy and stay in registers
#endif
  T* lanes;
  int64_t H;
  static int64_t size(int64_t H) { return round_up(H, kRows) * round_up(H, kCols) * kLanes<T>; }
  void clear() const {
    for (int64_t x = 0; x < size(H); x += kLanes<T>) store(lanes + x, Vec<T>{});
  }
  // sums[g, h] += sum_x a[g][x] (b[h][x] - shift), if Symmetric only in blocks that have some g <= h.
  void add(int64_t L, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T shift) const {
    T* sums = lanes;
    for (int64_t g = 0; g < H; g += kRows)
      for (int64_t h = first_column(g); h < H; h += kCols, sums += kRows * kCols * kLanes<T>)
        block(L, a, a_stride, b, b_stride, shift, g, h, sums);
  }
  // gram[g * H + h] += sums[g, h]
  void add_to(double* gram) const {
    const T* sums = lanes;
    for (int64_t g = 0; g < H; g += kRows)
      for (int64_t h = first_column(g); h < H; h += kCols)
        for (int i = 0; i < kRows; i++)
          for (int j = 0; j < kCols; j++, sums += kLanes<T>)
            if (g + i < H && h + j < H) gram[(g + i) * H + h + j] += double(sum_lanes<T>(load(sums)));
  }

 private:
  static int64_t first_column(int64_t g) { return Symmetric ? g / kCols * kCols : 0; }
  __attribute__((noinline)) void block(int64_t L, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                                       T shift, int64_t g, int64_t h, T* sums) const {
    // a block that sticks out repeats the last head, and the result is not used
    const T *ar[kRows], *br[kCols];
    for (int i = 0; i < kRows; i++) ar[i] = a + min64(g + i, H - 1) * a_stride;
    for (int j = 0; j < kCols; j++) br[j] = b + min64(h + j, H - 1) * b_stride;
    Vec<T> acc[kRows][kCols];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 6
      for (int j = 0; j < kCols; j++) acc[i][j] = load(sums + (i * kCols + j) * kLanes<T>);
    for (int64_t x = 0; x < L; x += kLanes<T>) {
      Vec<T> av[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; i++) av[i] = load(ar[i] + x);
#pragma GCC unroll 6
      for (int j = 0; j < kCols; j++) {
        const Vec<T> bv = load(br[j] + x) - shift;
#pragma GCC unroll 4
        for (int i = 0; i < kRows; i++) acc[i][j] += av[i] * bv;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 6
      for (int j = 0; j < kCols; j++) store(sums + (i * kCols + j) * kLanes<T>, acc[i][j]);
  }
};

// The same for sums of a head alone.
template <class T>
struct HeadSums {
  T* lanes;
  int64_t H;
  static int64_t size(int64_t H) { return H * kLanes<T>; }
  void clear() const {
    for (int64_t x = 0; x < size(H); x += kLanes<T>) store(lanes + x, Vec<T>{});
  }
  void add(int64_t h, Vec<T> v) const { store(lanes + h * kLanes<T>, load(lanes + h * kLanes<T>) + v); }
  void add_to(double* sums) const {
    for (int64_t h = 0; h < H; h++) sums[h] += double(sum_lanes<T>(load(lanes + h * kLanes<T>)));
  }
};

template <class T>
Vec<T> sum_vectors(int64_t L, const T* x) {
  Vec<T> sum = {}, other = {};
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= L; i += 2 * kLanes<T>) {
    sum += load(x + i);
    other += load(x + i + kLanes<T>);
  }
  return i < L ? sum + other + load(x + i) : sum + other;
}

// copy = x; returns the sum.
template <class T>
Vec<T> copy_and_sum(int64_t L, const T* x, T* copy) {
  Vec<T> sum = {};
  for (int64_t i = 0; i < L; i += kLanes<T>) {
    const Vec<T> v = load(x + i);
    sum += v;
    store(copy + i, v);
  }
  return sum;
}

template <class T>
Vec<T> sum_products(int64_t L, const T* x, const T* y) {
  Vec<T> sum = {}, other = {};
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= L; i += 2 * kLanes<T>) {
    sum += load(x + i) * load(y + i);
    other += load(x + i + kLanes<T>) * load(y + i + kLanes<T>);
  }
  return i < L ? sum + other + load(x + i) * load(y + i) : sum + other;
}

template <class T>
VITDIV_INLINE Vec<T> reciprocal_sqrt(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    v = (Vec<T>)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)v);
  else
    v = (Vec<T>)_mm512_maskz_sqrt_pd(__mmask8(-1), (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    v = (Vec<T>)_mm256_sqrt_ps((__m256)v);
  else
    v = (Vec<T>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < kLanes<T>; i++)
    v[i] = sizeof(T) == 4 ? T(__builtin_sqrtf(float(v[i]))) : T(__builtin_sqrt(v[i]));
#endif
  return T(1) / v;
}

// Layer norm over heads at each position: out = weight * normalised + bias. normalised may be x itself; rstd
// and out may be null; out may be x when normalised is null.
template <class T>
void layer_norm_heads(int64_t H, int64_t L, const T* x, T* normalised, T* rstd, T* out, int64_t stride,
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
      if (normalised) store(normalised + h * stride + i, n);
      if (out) store(out + h * stride + i, n * weight[h] + bias[h]);
    }
  }
}

// dy, the gradient of the layer norm's output, becomes that of its input.
template <class T>
void layer_norm_heads_bwd(int64_t H, int64_t L, const T* normalised, const T* rstd, T* dy, int64_t stride,
                          const T* weight) {
  const T inv_h = T(1) / T(H);
  for (int64_t i = 0; i < L; i += kLanes<T>) {
    Vec<T> mean = {}, projection = {};
    for (int64_t h = 0; h < H; h++) {
      const Vec<T> dn = load(dy + h * stride + i) * weight[h];
      mean += dn;
      projection += dn * load(normalised + h * stride + i);
    }
    mean *= inv_h;
    projection *= inv_h;
    const Vec<T> r = load(rstd + i);
    for (int64_t h = 0; h < H; h++) {
      const Vec<T> dn = load(dy + h * stride + i) * weight[h];
      store(dy + h * stride + i, r * (dn - mean - load(normalised + h * stride + i) * projection));
    }
  }
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
