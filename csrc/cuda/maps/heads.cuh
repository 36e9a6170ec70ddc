// Where heads meet: mixes and sums of products over the heads of a chunk of maps in shared memory, and the
// layer norm over heads. A warp takes 16 columns of one query row of all heads at a time; what it makes of
// them lies in its lanes as HeadTile: head 16 group + tile_row(e), column 8 j + tile_col(e). GROUPS: 1 for up
// to 16 heads, 2 for up to 32.
#pragma once

#include <cmath>

#include "../core/mma.cuh"
#include "../core/reduce.cuh"

namespace vitdiv::cuda {

inline constexpr int kMaxMixedHeads = 32;

template <class A, int GROUPS>
using HeadTile = A[GROUPS][2][4];

// Places of a chunk [heads, rows, columns] in shared memory, in elements.
template <class M>
struct Chunk {
  int heads, row, head, zeros, size;
  Chunk() = default;
  HOST_DEVICE Chunk(int heads, int rows, int columns)
      : heads(heads),
        row(row_stride<M>(columns)),
        head(rows * row + Numbers<M>::kPad),
        zeros(heads * head),  // stand for the rows of heads that are not there
        size(zeros + Numbers<M>::kPad) {}
  DEVICE Chunk renewed() const {
    Chunk chunk = *this;
    chunk.row = cuda::renewed(row), chunk.head = cuda::renewed(head), chunk.zeros = cuda::renewed(zeros);
    return chunk;
  }
  // Before the first use, by all threads; a barrier must follow.
  DEVICE void clear_zeros(Shared<M> chunk) const {
    if (thread_x() < Numbers<M>::kPad) chunk.st(zeros + thread_x(), M{});
  }
  DEVICE int place(int h, int i, int x) const { return h < heads ? place_of_head(h, i, x) : zeros; }
  DEVICE int place_of_head(int h, int i, int x) const { return h * head + i * row + x; }  // that is there
};

// A matrix [heads, heads] in shared memory, a left factor. A row in 16 bits is divided by a power of two,
// unit(g), that makes its largest element 1 to 2, and held as the sum of two numbers, a high and a low part:
// what remains is rounded to 22 (half_t) or 16 (bf16_t) bits. Otherwise unit(g) is 1.
template <class M>
struct HeadMatrix {
  static constexpr int kParts = sizeof(M) == 2 ? 2 : 1;
  HOST_DEVICE static constexpr int part_size(int heads) { return padded_width(heads) * row_stride<M>(heads); }
  HOST_DEVICE static constexpr int size(int heads) { return kParts * part_size(heads); }

  Shared<M> data;        // [size(heads)]
  Shared<Acc<M>> units;  // [padded_width(heads)]
  int heads;

  // element(g, h), by all threads of the block; a barrier must follow.
  template <class Element>
  DEVICE void fill(Element element) const {
    const int stride = row_stride<M>(heads), h = lane_id();
    for (int g = thread_x() >> 5; g < padded_width(heads); g += threads() >> 5) {
      const Acc<M> x = g < heads && h < heads ? element(g, h) : Acc<M>(0);
      Acc<M> unit = 1;
      if constexpr (kParts == 2) {
        const float largest = warp_max(fabsf(x));
        if (largest > 0 && largest < INFINITY) unit = ldexpf(1, ilogbf(largest));
      }
      if (h == 0) units.st(g, unit);
      if (h >= padded_width(heads)) continue;
      if constexpr (kParts == 2) {
        const M high = from_float<M>(x / unit);
        data.st(g * stride + h, high);
        data.st(part_size(heads) + g * stride + h, from_float<M>(x / unit - to_float(high)));
      } else {
        data.st(g * stride + h, x);
      }
    }
  }
  DEVICE FragmentA<M> fragment(int group, int step, int part) const {
    FragmentA<M> a;
    load_a(a, data, [&](int g, int k) {
      return part * part_size(heads) + (16 * group + g) * row_stride<M>(heads) + step * kDepth<M> + k;
    });
    return a;
  }
};

// The same in registers: 8 (32 for two groups) in 16 bits, otherwise 16 (64).
template <class M, int GROUPS>
struct HeldMatrix {
  static constexpr int kSteps = 16 * GROUPS / kDepth<M>, kParts = HeadMatrix<M>::kParts;
  FragmentA<M> a[GROUPS][kSteps][kParts];
  DEVICE void load(const HeadMatrix<M>& from) {
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
      UNROLLED_FOR (int step = 0; step < kSteps; ++step)
        UNROLLED_FOR (int part = 0; part < kParts; ++part)
          if (16 * group < from.heads && step * kDepth<M> < from.heads)
            a[group][step][part] = from.fragment(group, step, part);
  }
  DEVICE const FragmentA<M>& fragment(int group, int step, int part) const { return a[group][step][part]; }
};

// tile += sum over heads h of matrix[g, h] / unit(g) times x_h[i, x + column]. x is the sum of PARTS chunks
// of the same places. matrix: HeadMatrix or HeldMatrix.
template <class M, int GROUPS, class Matrix, int PARTS>
DEVICE void mix_heads(Acc<M> (&tile)[GROUPS][2][4], const Matrix& matrix, const Shared<M> (&chunk)[PARTS],
                      const Chunk<M>& at, int i, int x) {
  UNROLLED_FOR (int step = 0; step < 16 * GROUPS / kDepth<M>; ++step) {
    if (step * kDepth<M> >= at.heads) continue;
    UNROLLED_FOR (int part = PARTS - 1; part >= 0; --part) {
      FragmentB<M> b[2];
      load_b<true>(b, chunk[part],
                   [&](int column, int k) { return at.place(step * kDepth<M> + k, i, x + column); });
      UNROLLED_FOR (int group = 0; group < GROUPS; ++group) {
        if (16 * group >= at.heads) continue;
        // the product of two low parts is below what is rounded
        UNROLLED_FOR (int own = HeadMatrix<M>::kParts - 1; own >= 0; --own)
          if (part == 0 || own == 0) multiply_add<M>(tile[group], matrix.fragment(group, step, own), b);
      }
    }
  }
}

// sums[g, h] of x_g y_h over columns and rows, each warp its own, and at last those of the block.
template <class M, int GROUPS>
struct HeadProducts {
  Acc<M> sums[GROUPS][GROUPS][2][4];

  DEVICE void clear() {
    UNROLLED_FOR (int first = 0; first < GROUPS; ++first)
      UNROLLED_FOR (int second = 0; second < GROUPS; ++second)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 0; e < 4; ++e) sums[first][second][j][e] = 0;
  }

  // The 16 columns from x on of row i.
  DEVICE void add(Shared<M> left, Shared<M> right, const Chunk<M>& at, int i, int x) {
    for (int k0 = x; k0 < x + 16; k0 += kDepth<M>) {
      FragmentB<M> b[GROUPS][2];
      UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
        if (16 * group < at.heads)
          load_b(b[group], right, [&](int h, int k) { return at.place(16 * group + h, i, k0 + k); });
      UNROLLED_FOR (int first = 0; first < GROUPS; ++first) {
        if (16 * first >= at.heads) continue;
        FragmentA<M> a;
        load_a(a, left, [&](int h, int k) { return at.place(16 * first + h, i, k0 + k); });
        UNROLLED_FOR (int second = 0; second < GROUPS; ++second)
          if (16 * second < at.heads) multiply_add<M>(sums[first][second], a, b[second]);
      }
    }
  }
  // The same with itself: pairs of groups (first <= second) only, and no second load.
  DEVICE void add_square(Shared<M> chunk, const Chunk<M>& at, int i, int x) {
    for (int k0 = x; k0 < x + 16; k0 += kDepth<M>) {
      FragmentA<M> a[GROUPS];
      UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
        if (16 * group < at.heads)
          load_a(a[group], chunk, [&](int h, int k) { return at.place(16 * group + h, i, k0 + k); });
      UNROLLED_FOR (int second = 0; second < GROUPS; ++second) {
        if (16 * second >= at.heads) continue;
        FragmentB<M> b[2];
        transpose<M>(b, a[second]);
        UNROLLED_FOR (int first = 0; first <= second; ++first)
          multiply_add<M>(sums[first][second], a[first], b);
      }
    }
  }

  HOST_DEVICE static constexpr int space(int warps) { return 256 * warps; }
  // out[at + g heads + h] = unit times the block's sums, added in the order of the warps. `space` is free to
  // be used once all threads are here; `square`: what add_square has made. By all threads of the block.
  DEVICE void store(Shared<Acc<M>> space, Global<Acc<M>> out, int64_t at, int heads, Acc<M> unit,
                    bool square) const {
    const int warp = thread_x() >> 5, warps = threads() >> 5;
    UNROLLED_FOR (int first = 0; first < GROUPS; ++first)
      UNROLLED_FOR (int second = 0; second < GROUPS; ++second) {
        if (16 * first >= heads || 16 * second >= heads || (square && first > second)) continue;
        sync_block();
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 0; e < 4; ++e)
            space.st(256 * warp + 16 * tile_row(e) + 8 * j + tile_col(e), sums[first][second][j][e]);
        sync_block();
        for (int c = thread_x(); c < 256; c += threads()) {
          const int g = 16 * first + c / 16, h = 16 * second + c % 16;
          if (g >= heads || h >= heads) continue;
          Acc<M> sum = 0;
          for (int w = 0; w < warps; ++w) sum += space.ld(256 * w + c);
          out.st(at + g * heads + h, sum * unit);
          if (square && first < second) out.st(at + h * heads + g, sum * unit);
        }
      }
  }
};

// x(g, c) summed over all heads g of a tile, for the columns of this lane: sum[j][e] of column 8 j +
// tile_col(e). Heads that are not there must be 0.
template <class A, int GROUPS>
DEVICE void sum_heads(A (&sum)[2][2], const A (&tile)[GROUPS][2][4]) {
  UNROLLED_FOR (int j = 0; j < 2; ++j)
    UNROLLED_FOR (int e = 0; e < 2; ++e) {
      A s = 0;
      UNROLLED_FOR (int group = 0; group < GROUPS; ++group) s += tile[group][j][e] + tile[group][j][e + 2];
      UNROLLED_FOR (int mask = 4; mask < 32; mask *= 2) s += warp_shuffle_xor(s, mask);
      sum[j][e] = s;
    }
}

// The layer norm over heads without weight and bias, in place; 0 for heads that are not there. rstd: 1 /
// deviation, by columns as in sum_heads.
template <class A, int GROUPS>
DEVICE void normalise_heads(A (&tile)[GROUPS][2][4], A (&rstd)[2][2], int heads, A eps) {
  A sum[2][2];
  const A part = A(1) / heads;
  sum_heads(sum, tile);
  HeadTile<A, GROUPS> square;
  UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int e = 0; e < 4; ++e) {
        const bool there = 16 * group + tile_row(e) < heads;
        const A x = there ? tile[group][j][e] - sum[j][e & 1] * part : A(0);
        tile[group][j][e] = x;
        square[group][j][e] = x * x;
      }
  sum_heads(sum, square);
  UNROLLED_FOR (int j = 0; j < 2; ++j)
    UNROLLED_FOR (int e = 0; e < 2; ++e) rstd[j][e] = reciprocal_sqrt(sum[j][e] * part + eps);
  UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int e = 0; e < 4; ++e) tile[group][j][e] *= rstd[j][e & 1];
}

}  // namespace vitdiv::cuda
