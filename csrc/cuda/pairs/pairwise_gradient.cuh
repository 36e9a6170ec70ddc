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

// Weights that are functions of the pairs' products, which are made again. `Weights` says how many kinds of
// products there are, 1 or 2: x with y, whose unit vectors are multiplied by the weights, and z with itself;
// and whether tiles are narrow.
//   begin(item)                     before the others
//   row(at), column(at)             what a weight takes from the row's and from the column's side: a Side
//   weight(row, column, s, t, itself)
//   factor(item)                    of the sum
template <class T, class Weights>
struct WeightedKernel : Gradient<T> {
  Vectors<T> y;  // [items, M, D]
  Vectors<T> z;  // [items, N, D2], N = M; its width may be 0: then there is no second product
  bool within;   // y is x
  Global<const Acc<T>> y_inverse_norms;  // [items, M]
  Global<const Acc<T>> z_inverse_norms;  // [items, N]
  Weights weights;
};

// With two kinds of products the first to be made wait in shared memory. Narrow tiles find room there with
// the little shared memory of sm_89, and registers for weights that take more of them.
template <class T, class Weights>
struct WeightedLayout : GradientLayout<T, CosineTile<T>::kSize, CosineTile<T>::kSize> {
  using Tile = CosineTile<T>;
  using Gradient = GradientLayout<T, Tile::kSize, Tile::kSize>;
  static constexpr int kGroups = Weights::kNarrow ? 1 : Tile::kGroups, kColumns = 64 * kGroups;
  static constexpr int kStage = (Tile::kSize + kColumns) * Tile::kStride;
  static constexpr int kWeightStride = row_stride<T>(kColumns), kWeights = Tile::kSize * kWeightStride;
  static constexpr int kWaiting = Weights::kGrams == 2 ? 32 * kGroups * Tile::kThreads : 0;
  // first the products' ring, then in the same place weights and unit vectors, at last the gradient
  static constexpr int kMemory =
      std::max(std::max(2 * kStage, kWeights + Gradient::kUnit), Gradient::kAllTurned);
  static constexpr int64_t kBytes =
      kMemory * int64_t(sizeof(T)) + (kWaiting + 2 * Tile::kSize) * int64_t(sizeof(Acc<T>));
};

// u_i = sum_j weight(S[i, j], T[i, j]) ŷ_j, S of x and y, T of z; dx_i = factor inverse_norm_i (u_i - x̂_i
// (x̂_i . u_i)).
template <class T, class Weights>
KERNEL LAUNCH_BOUNDS(CosineTile<T>::kThreads, 1) weighted_tile(WeightedKernel<T, Weights> a) {
  using Tile = CosineTile<T>;
  using Layout = WeightedLayout<T, Weights>;
  using A = Acc<T>;
  constexpr int groups = Layout::kGroups;
  const bool waits = Weights::kGrams == 2 && a.z.width > 0;
  const int n = a.x.count, m = a.y.count, tiles = a.row_tiles * a.width_tiles, tile = block_x() % tiles;
  const int64_t item = block_x() / tiles;
  const int row0 = tile / a.width_tiles * Layout::kRows, k0 = tile % a.width_tiles * Layout::kWidth;
  const auto part_of_gradient = [&](int k) {
    return CosinePart<T>::of_tile(row0, renewed(k), n, a.x.width, false);
  };
  Carver carve;
  const Shared<T> memory = carve.take<T>(Layout::kMemory);
  const Shared<A> waiting = carve.take<A>(Layout::kWaiting), sums = carve.take<A>(2 * Tile::kSize);
  const CosineProducts<T, groups> products{memory, 2, Layout::kStage, Tile::kSize};
  UnitVectors<T, Layout> unit{a.y, a.y_inverse_norms, item * a.y.item, item * m, k0, {}, {}};
  Weights weights = a.weights;
  weights.begin(item);
  CosineSums<T> acc = {};

  for (int next = 0; next < m; next += Layout::kColumns) {
    const int column0 = renewed(next);
    const auto product = CosinePart<T>::template of_tile<groups>(renewed(row0), column0, n, m, false);
    const int row = row0 + product.row, column = column0 + product.column;
    const bool among_rows = column0 >= row0 && column0 < row0 + Tile::kSize;
    CosineSums<T, groups> s;
    Powers<T> powers{}, z_powers;
    ROLLED_FOR (int gram = waits ? 1 : 0; gram >= 0; --gram) {
      const bool of_z = Weights::kGrams == 2 && gram == 1;
      z_powers = powers;
      const auto inverse_norm = [&](int set,
                                    int i) {  // computed anew: no registers are left through the products
        const int64_t of_item = renewed(block_x()) / tiles;
        const int at = renewed(set ? column0 : row0) + i, count = set ? m : n;
        const auto inverse_norms = of_z ? a.z_inverse_norms : set ? a.y_inverse_norms : a.x_inverse_norms;
        return at < count ? inverse_norms.ld(of_item * count + at) : A(0);
      };
      powers = Powers<T>::of_tile(Tile::kSize, inverse_norm);
      const Vectors<T> rows = of_z ? a.z : a.x, columns = of_z ? a.z : a.y;
      UNROLLED_FOR (int g = 0; g < groups; ++g)
        UNROLLED_FOR (int h = 0; h < 2; ++h)
          UNROLLED_FOR (int r = 0; r < 2; ++r)
            UNROLLED_FOR (int j = 0; j < 2; ++j)
              UNROLLED_FOR (int e = 0; e < 4; ++e) s[g][h][r][j][e] = 0;
      sync_block();  // the memory may still be in use
      products.add(s, product, rows, item * rows.item, row0, columns, item * columns.item, column0,
                   among_rows && (of_z || a.within), powers, inverse_norm, [](int) {});
      if constexpr (Weights::kGrams == 2)
        if (of_z)
          UNROLLED_FOR (int i = 0; i < 32 * groups; ++i)
            waiting.st(i * Tile::kThreads + thread_x(), s[i / 32][i / 16 % 2][i / 8 % 2][i / 4 % 2][i % 4]);
    }
    sync_block();

    UNROLLED_FOR (int r = 0; r < 2; ++r) {
      sync_warp();  // as below, of other rows
      const int first = row + 16 * r;
      A along[2] = {}, row_inverse_norm[2], z_row_inverse_norm[2];
      typename Weights::Side row_side[2];
      UNROLLED_FOR (int i = 0; i < 2; ++i) {
        const int at = first + tile_row(2 * i);
        const bool inside = at < n;
        row_side[i] = weights.row(item * n + (inside ? at : 0));
        row_inverse_norm[i] = inside ? powers.left_of(a.x_inverse_norms.ld(item * n + at)) : A(0);
        if (waits)
          z_row_inverse_norm[i] = inside ? z_powers.left_of(a.z_inverse_norms.ld(item * n + at)) : A(0);
      }
      UNROLLED_FOR (int g = 0; g < groups; ++g)
        UNROLLED_FOR (int h = 0; h < 2; ++h)
          UNROLLED_FOR (int j = 0; j < 2; ++j) {
            sync_warp();  // keeps the compiler from loading what other columns need, too
            const int bit = 32 * g + 16 * h + 8 * j + tile_col(0), to = column + bit;
            typename Weights::Side column_side[2];
            A inverse_norm[2], z_inverse_norm[2];
            UNROLLED_FOR (int e = 0; e < 2; ++e) {
              const bool inside = to + e < m;
              column_side[e] = weights.column(item * m + (inside ? to + e : 0));
              inverse_norm[e] = inside ? powers.left_of(a.y_inverse_norms.ld(item * m + to + e)) : A(0);
              if (waits)
                z_inverse_norm[e] = inside ? z_powers.left_of(a.z_inverse_norms.ld(item * m + to + e)) : A(0);
            }
            UNROLLED_FOR (int i = 0; i < 2; ++i) {
              const int from = first + tile_row(2 * i);
              A w[2];
              UNROLLED_FOR (int e = 0; e < 2; ++e) {
                const int at = 2 * i + e;
                // the product of the inverse norms first: equal pairs then have equal cosines
                const A cosine = s[g][h][r][j][at] * (row_inverse_norm[i] * inverse_norm[e]);
                A t = 0;
                if (waits)
                  t = waiting.ld((32 * g + 16 * h + 8 * r + 4 * j + at) * Tile::kThreads + thread_x()) *
                      (z_row_inverse_norm[i] * z_inverse_norm[e]);
                w[e] = from < n && to + e < m
                           ? weights.weight(row_side[i], column_side[e], cosine, t, from == to + e)
                           : A(0);
                along[i] += w[e] * cosine;
              }
              store2(memory, (from - row0) * Layout::kWeightStride + product.column + bit, w[0], w[1]);
            }
          }
      UNROLLED_FOR (int i = 0; i < 2; ++i) {
        const A sum = quad_sum(along[i]);
        const int at = product.column / (32 * groups) * Tile::kSize + first - row0 + tile_row(2 * i);
        if ((lane_id() & 3) == 0) sums.st(at, column0 == 0 ? sum : sums.ld(at) + sum);
      }
    }
    const auto part = part_of_gradient(k0);
    const int end = m - column0 < Layout::kColumns ? m - column0 : Layout::kColumns;
    for (int first = 0; first < end; first += 32) {
      sync_block();  // keeps the compiler from loading while the products take the registers
      unit.k0 = renewed(k0);
      unit.load(column0 + first);
      unit.store(memory.part(Layout::kWeights, Layout::kUnit), column0 + first);
      sync_block();
      add_unit_vectors<T, Layout, false>(
          acc, part, memory, Layout::kWeights, [&](FragmentA<T>& w, int r, int j) {
            load_a(w, memory, [&](int at, int k) {
              return (part.row + 16 * r + at) * Layout::kWeightStride + first + j + k;
            });
          });
    }
  }

  sync_block();  // the memory may still be in use
  const auto part = part_of_gradient(k0);
  if (part.any())
    write_gradient<T, Layout>(a, acc, part, memory, item, row0, k0, weights.factor(item),
                              [&](int at) { return sums.ld(at) + sums.ld(Tile::kSize + at); });
}

template <class T, class Weights>
void launch_weighted(const char* operation, WeightedKernel<T, Weights>& a, const char* name,
                     const BatchView& dx, int64_t items, void* stream) {
  using Layout = WeightedLayout<T, Weights>;
  set_gradient<T, Layout>(a, name, dx, items);
  launch(operation, weighted_tile<T, Weights>, items * a.row_tiles * a.width_tiles, CosineTile<T>::kThreads,
         Layout::kBytes, stream, a);
}

}  // namespace vitdiv::cuda
