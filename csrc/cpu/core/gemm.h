// The matrix-product micro-kernel that every CPU kernel stands on: C [M, N] (+)= A [M, K] B [K, N], with C
// held in registers, kMaxRows x kPanel at a time.
//
// B is read in panels of kPanel columns, each contiguous: out[panel][k][kPanel]. pack_rows makes them of a
// matrix and pack_transposed of its transpose, the columns beyond N zero. (Reading B's rows in place instead
// lets rows that lie a large power of two apart, as in a packed qkv projection, evict each other from L1.)
// Columns are computed in whole vectors: C must be writable up to round_up(N, kLanes) columns.
#pragma once

#include "simd.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

// Panels of a matrix of `depth` rows, from one of its rows on.
template <class T>
struct Panels {
  const T* data;
  int64_t depth;
};

// A(r, k) is a[r * lda + k], or with Transposed a[k * lda + r].
template <class T, int Rows, int Vectors, bool Transposed>
__attribute__((noinline)) void micro_kernel(int64_t K, const T* __restrict a, int64_t lda,
                                            const T* __restrict b, T* __restrict c, int64_t ldc,
                                            bool accumulate) {
  Vec<T> acc[Rows][Vectors] = {};  // c is added at the end, so that no multiplication waits for it
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) __builtin_prefetch(c + r * ldc, 1);
  const int64_t step = Transposed ? lda : 1;
  const auto add = [&](int64_t k) {
    Vec<T> bk[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; v++) bk[v] = load(b + k * kPanel<T> + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      const T ark = Transposed ? a[k * step + r] : a[r * lda + k];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; v++) acc[r][v] += ark * bk[v];
    }
  };
  for (int64_t k = 1; k < K; k += 2) {  // four at a time made the compiler spill accumulators
    add(0);
    add(1);
    b += 2 * kPanel<T>;
    a += 2 * step;
  }
  if (K % 2) add(0);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; v++) {
      T* out = c + r * ldc + v * kLanes<T>;
      store(out, accumulate ? load(out) + acc[r][v] : acc[r][v]);
    }
}

template <class T, int Vectors, bool Transposed, int Rows = kMaxRows>
VITDIV_INLINE void micro_kernel_rows(int64_t rows, int64_t K, const T* a, int64_t lda, const T* b, T* c,
                                     int64_t ldc, bool accumulate) {
  if constexpr (Rows > 1) {
    if (rows < Rows)
      return micro_kernel_rows<T, Vectors, Transposed, Rows - 1>(rows, K, a, lda, b, c, ldc, accumulate);
  }
  micro_kernel<T, Rows, Vectors, Transposed>(K, a, lda, b, c, ldc, accumulate);
}

// M rows in blocks of at most kMaxRows that differ by at most one row: a last block of one row would waste
// the kernel.
struct RowBlocks {
  int64_t count, base, longer;
  explicit RowBlocks(int64_t M)
      : count(ceil_div(M, kMaxRows)), base(count ? M / count : 0), longer(count ? M % count : 0) {}
  int64_t begin(int64_t i) const { return i * base + min64(i, longer); }
  int64_t size(int64_t i) const { return base + (i < longer); }
};

template <class T, bool Transposed>
void gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t lda, Panels<T> b, T* c, int64_t ldc,
          bool accumulate) {
  const RowBlocks blocks(M);
  for (int64_t j = 0; j < N; j += kPanel<T>) {
    const T* panel = b.data + j * b.depth;
    for (int64_t i = 0; i < blocks.count; i++) {
      const int64_t r = blocks.begin(i), rows = blocks.size(i);
      const T* ai = Transposed ? a + r : a + r * lda;
      if (N - j > kLanes<T>)
        micro_kernel_rows<T, 2, Transposed>(rows, K, ai, lda, panel, c + r * ldc + j, ldc, accumulate);
      else
        micro_kernel_rows<T, 1, Transposed>(rows, K, ai, lda, panel, c + r * ldc + j, ldc, accumulate);
    }
  }
}

template <class T>
VITDIV_INLINE int64_t packed_size(int64_t columns, int64_t depth) {
  return round_up(columns, kPanel<T>) * depth;
}

#if defined(__AVX2__)
// out[k * out_ld + col] = rows[col * ld + k] for 8 x 8: 24 shuffles instead of 64 scalar loads and stores. Of
// fewer than 8 rows the rest are 0.
VITDIV_INLINE void transpose_8x8(const float* rows, int64_t ld, float* out, int64_t out_ld,
                                 int64_t count = 8) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = i < count ? _mm256_loadu_ps(rows + i * ld) : _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {  // pairs of rows interleaved
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {  // fours of rows, each half holding columns k and k + 4
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(out + i * out_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// Panels of the transpose of rows [N, K]: N columns, depth K.
template <class T>
void pack_transposed(int64_t N, int64_t K, const T* rows, int64_t ld, T* out) {
  constexpr int P = kPanel<T>;
  for (int64_t j = 0; j < N; j += P, out += K * P) {
    const int64_t width = min64(P, N - j);
    int64_t k0 = 0;
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      for (; k0 + 8 <= K; k0 += 8) {
        // the next panel's rows, which the hardware does not foresee: it sees as many streams as there are
        // rows
        for (int64_t col = k0 % 16 ? P : 0; col < P; col++)
          __builtin_prefetch(rows + (j + P + col) * ld + k0);
        for (int64_t col = 0; col < P; col += 8) {
          const T* block = rows + (j + col) * ld + k0;
          if (col + 8 <= width)
            transpose_8x8(block, ld, out + k0 * P + col, P);
          else
            transpose_8x8(block, ld, out + k0 * P + col, P, width - col);
        }
      }
    }
#endif
    // 16 values of a row at a time: its cache line is used whole while the 16 destination lines stay in L1
    for (int64_t first = k0; k0 < K; k0 += 16) {
      const int64_t k1 = min64(K, k0 + 16);
      for (int64_t col = 0; col < width; col++) {
        const T* x = rows + (j + col) * ld;
        for (int64_t k = k0; k < k1; k++) out[k * P + col] = x[k];
      }
      if (k1 == K)
        for (int64_t k = first; k < K; k++)
          for (int64_t col = width; col < P; col++) out[k * P + col] = 0;
    }
  }
}

// The triangle below the diagonal of a [n, n], rows `ld` apart, becomes the mirror image of that above.
template <class T>
void mirror_upper(int64_t n, T* a, int64_t ld) {
  constexpr int64_t kBlock = 8;  // both sides of a block stay in L1
  for (int64_t r0 = 0; r0 < n; r0 += kBlock)
    for (int64_t c0 = 0; c0 <= r0; c0 += kBlock) {
      const int64_t r1 = min64(n, r0 + kBlock);
#if defined(__AVX2__)
      if constexpr (sizeof(T) == 4) {
        if (c0 < r0 && r1 == r0 + kBlock) {
          transpose_8x8(a + c0 * ld + r0, ld, a + r0 * ld + c0, ld);
          continue;
        }
      }
#endif
      for (int64_t r = r0; r < r1; r++)
        for (int64_t c = c0; c < min64(r, c0 + kBlock); c++) a[r * ld + c] = a[c * ld + r];
    }
}

// One row of N columns into row k of panels of the given depth.
template <class T>
VITDIV_INLINE void pack_row(int64_t N, const T* row, int64_t k, int64_t depth, T* out) {
  constexpr int P = kPanel<T>;
  out += k * P;
  int64_t j = 0;
  for (; j + P <= N; j += P, out += depth * P) {
    store(out, load(row + j));
    store(out + kLanes<T>, load(row + j + kLanes<T>));
  }
  for (int64_t col = 0; j < N && col < P; col++) out[col] = j + col < N ? row[j + col] : T(0);
}

// Panels of rows [K, N]: N columns, depth K.
template <class T>
void pack_rows(int64_t K, int64_t N, const T* rows, int64_t ld, T* out) {
  for (int64_t k = 0; k < K; k++) pack_row(N, rows + k * ld, k, K, out);
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
