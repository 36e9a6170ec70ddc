// Gradients of vectors that come from all pairs: a block owns a tile of the gradient, vectors by features,
// and walks over the other vectors, 32 at a time: it makes unit vectors of them in shared memory and
// multiplies them with the pairs' weights, the slopes of what is summed. What the normalisation takes out is
// known for each vector before its gradient is written, so that no block needs whole vectors.
#pragma once

#include <algorithm>

#include "pairwise_cosine.cuh"

namespace vitdiv::cuda {

// Whose gradient it is, and where it goes.
template <class T>
struct Gradient {
  Vectors<T> x;                          // [items, N, D]
  Global<const Acc<T>> x_inverse_norms;  // [items, N]
  Acc<T> inverse_eps;  // nothing is taken out of vectors with this inverse norm or a larger one
  bool pieces;         // x and dx are in pieces of 16 bytes
  int row_tiles;
  int width_tiles;
  Global<T> dx;  // [items, N, D]
  int64_t dx_item;
  int64_t dx_row;
};

// A block's tile of the gradient, and places in shared memory.
template <class T, int ROWS, int WIDTH>
struct GradientLayout {
  using Tile = CosineTile<T>;
  static constexpr int kRows = ROWS, kWidth = WIDTH;
  // 32 other vectors as the right factor; columns of a fragment lie in different banks
  static constexpr int kUnitStride = kWidth + (sizeof(T) == 8 ? 4 : 8), kUnit = 32 * kUnitStride;
  // 32 x 16 of the gradient of unit vectors, on their way out
  static constexpr int kTurnedStride = 16 + Numbers<Acc<T>>::kPad, kTurned = 32 * kTurnedStride;
  static constexpr int kAllTurned = Tile::kThreads / 32 * kTurned * int(sizeof(Acc<T>) / sizeof(T));
  static constexpr int kPieces = 32 * kWidth / kPiece<T> / Tile::kThreads;  // of a thread
};

// Where weights cost little to read, a tall tile, whose unit vectors each block reads once for more rows, is
// the cheaper one.
template <class T>
using TallLayout = GradientLayout<T, CosineTile<T>::kThreads, 32 * CosineTile<T>::kGroups>;

template <class T, class Layout>
void set_gradient(Gradient<T>& a, const char* name, const BatchView& dx, int64_t items) {
  const Vectors<T> out = vectors<T>(name, dx, items, a.x.count, a.x.width);
  a.pieces = a.x.pieces && out.pieces;
  a.row_tiles = static_cast<int>(ceil_div(a.x.count, Layout::kRows));
  a.width_tiles = static_cast<int>(ceil_div(a.x.width, Layout::kWidth));
  a.dx = {const_cast<T*>(out.data.p)};
  a.dx_item = out.item;
  a.dx_row = out.row;
}

// The unit vectors' way into shared memory: a piece waits in registers while the piece before is in use.
template <class T, class Layout>
struct UnitVectors {
  using Tile = CosineTile<T>;
  const Vectors<T>& y;
  Global<const Acc<T>> inverse_norms;
  int64_t item, first_inverse_norm;
  int k0;  // the first feature
  uint4 bits[Layout::kPieces];
  Acc<T> inverse_norm[Layout::kPieces];

  DEVICE static int row(int p) { return (p * Tile::kThreads + thread_x()) / (Layout::kWidth / kPiece<T>); }
  DEVICE static int column(int p) {
    return (p * Tile::kThreads + thread_x()) % (Layout::kWidth / kPiece<T>)*kPiece<T>;
  }
  DEVICE void load(int first) {
    if (!y.pieces) return;
    UNROLLED_FOR (int p = 0; p < Layout::kPieces; ++p) {
      const int j = first + row(p), k = k0 + column(p);
      const bool inside = j < y.count && k < y.width;
      bits[p] = inside ? y.data.template ld<uint4>(item + j * y.row + k) : uint4{0, 0, 0, 0};
      inverse_norm[p] = inside ? inverse_norms.ld(first_inverse_norm + j) : Acc<T>(0);
    }
  }
  DEVICE void store(Shared<T> to, int first) const {
    if (y.pieces) {
      UNROLLED_FOR (int p = 0; p < Layout::kPieces; ++p) {
        Acc<T> v[kPiece<T>];
        unpack<T>(bits[p], v);
        UNROLLED_FOR (int i = 0; i < kPiece<T>; ++i) v[i] *= inverse_norm[p];
        to.template st<uint4>(row(p) * Layout::kUnitStride + column(p), pack<T>(v));
      }
    } else {
      ROLLED_FOR (int p = thread_x(); p < 32 * Layout::kWidth; p += Tile::kThreads) {
        const int j = p / Layout::kWidth, k = p % Layout::kWidth;
        const bool inside = first + j < y.count && k0 + k < y.width;
        const Acc<T> v = inside ? to_float(y.data.ld(item + (first + j) * y.row + k0 + k)) *
                                      inverse_norms.ld(first_inverse_norm + first + j)
                                : Acc<T>(0);
        to.st(j * Layout::kUnitStride + k, from_acc<T>(v));
      }
    }
  }
};

// acc += weights of 32 other vectors times their unit vectors at `from`, for the warp's part of the tile.
// left(w, r, j): the weights of rows 16 r ... from the j-th vector on. EXACT: they are exact in tf32.
template <class T, class Layout, bool EXACT, class Left>
DEVICE void add_unit_vectors(CosineSums<T>& acc, const CosinePart<T>& part, Shared<T> memory, int from,
                             Left left) {
  if (!part.any()) return;
  for_each_step<T>(32, [&](int j) {
    FragmentA<T> w[2];
    UNROLLED_FOR (int r = 0; r < 2; ++r) left(w[r], r, j);
    UNROLLED_FOR (int g = 0; g < CosineTile<T>::kGroups; ++g) {
      if (g >= part.end) continue;
      UNROLLED_FOR (int h = 0; h < 2; ++h) {
        FragmentB<T> b[2];
        load_b<true>(b, memory, [&](int column, int k) {
          return from + (j + k) * Layout::kUnitStride + part.column + 32 * g + 16 * h + column;
        });
        UNROLLED_FOR (int r = 0; r < 2; ++r) multiply_add<T, EXACT>(acc[g][h][r], w[r], b);
      }
    }
  });
}

// From the gradient of unit vectors, which is `factor` acc, to that of x. along(row): x̂ . acc of a row of
// the tile. A warp turns 32 x 16 of it at a time in shared memory, so that each lane has a piece of a row.
template <class T, class Layout, class Along>
DEVICE void write_gradient(const Gradient<T>& a, CosineSums<T>& acc, const CosinePart<T>& part,
                           Shared<T> memory, int64_t item, int row0, int k0, Acc<T> factor, Along sum_along) {
  using A = Acc<T>;
  constexpr int piece = kPiece<T>, pieces = 16 / piece;
  const int place = thread_x() / 32 * Layout::kTurned;
  const Shared<A> turned = memory.template as<A>().part(place, Layout::kTurned);
  UNROLLED_FOR (int g = 0; g < CosineTile<T>::kGroups; ++g) {
    if (g >= part.end) continue;
    UNROLLED_FOR (int h = 0; h < 2; ++h) {
      sync_warp();
      UNROLLED_FOR (int r = 0; r < 2; ++r)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int i = 0; i < 2; ++i)
            store2(turned, (16 * r + tile_row(2 * i)) * Layout::kTurnedStride + 8 * j + tile_col(0),
                   acc[g][h][r][j][2 * i], acc[g][h][r][j][2 * i + 1]);
      sync_warp();
      ROLLED_FOR (int p = lane_id(); p < 32 * pieces; p += 32) {
        const int from = p / pieces, at = row0 + part.row + from, column = p % pieces * piece;
        const int k = k0 + part.column + 32 * g + 16 * h + column;
        if (at >= a.x.count || k >= a.x.width) continue;
        const A inverse_norm = a.x_inverse_norms.ld(item * a.x.count + at);
        const A along = inverse_norm * (inverse_norm < a.inverse_eps ? sum_along(part.row + from) : A(0));
        const int64_t x = item * a.x.item + at * a.x.row + k, dx = item * a.dx_item + at * a.dx_row + k;
        A v[piece], out[piece];
        if (a.pieces)
          unpack<T>(a.x.data.template ld<uint4>(x), v);
        else
          UNROLLED_FOR (int i = 0; i < piece; ++i)
            v[i] = k + i < a.x.width ? A(to_float(a.x.data.ld(x + i))) : A(0);
        UNROLLED_FOR (int i = 0; i < piece; ++i)
          out[i] =
              factor * inverse_norm * (turned.ld(from * Layout::kTurnedStride + column + i) - v[i] * along);
        if (a.pieces)
          a.dx.template st<uint4>(dx, pack<T>(out));
        else
          UNROLLED_FOR (int i = 0; i < piece; ++i)
            if (k + i < a.x.width) a.dx.st(dx + i, from_acc<T>(out[i]));
      }
    }
  }
}

}  // namespace vitdiv::cuda
