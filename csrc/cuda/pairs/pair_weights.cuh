// Gradients whose weights are functions of the pairs' products, S and T. The products are made again a tile at
// a time, and their weights wait in a workspace, those of some items or of some rows of one; then
// weighted_product.cu multiplies them with unit vectors. Weights within a set are the same both ways, so that
// with whole items only squares of 32 on and above the diagonal are there.
#pragma once

#include "pair_products.cuh"
#include "pairwise_gradient.cuh"

namespace vitdiv::cuda {

// Weights of items, or of rows of one item, and where they are.
template <class T>
struct WeightsOfPairs {
  bool triangle;       // only squares on and above the diagonal
  int64_t first_item;  // of this launch
  int first_row, rows;
  int stride;            // numbers between rows of weights: M, padded with zeros to a multiple of 32
  int slots;             // tiles of columns
  Global<T> weights;     // [items, rows, stride]
  Global<Acc<T>> along;  // [items, slots, rows]: sums of weight S over a tile's columns
};

// How many items, or rows of one, the workspace holds at a time; chunks of about the same size.
struct WeightsPlan {
  int64_t items, rows, stride, slots;
  WeightsPlan(const char* operation, ScalarType dtype, int64_t L, int64_t n, int64_t m) {
    const auto [bytes, tile] = with_type(dtype, [](auto number) {
      using T = decltype(number);
      return std::pair<int64_t, int64_t>(sizeof(T), CosineTile<T>::kSize);
    });
    stride = ceil_div(m, 32) * 32;
    slots = ceil_div(m, tile);
    const int64_t fit = workspace_bytes(operation) / (stride * bytes);  // rows
    items = std::max<int64_t>(1, std::min(L, fit / std::max<int64_t>(n, 1)));
    items = ceil_div(L, std::max<int64_t>(1, ceil_div(L, items)));
    const int64_t tiles = ceil_div(n, tile), most = std::max<int64_t>(1, fit / tile);
    rows = fit >= n ? n : ceil_div(tiles, ceil_div(tiles, most)) * tile;
  }
  int64_t weights() const { return items * rows * stride; }
  int64_t along() const { return items * slots * rows; }
};

// Weights: how many kinds of products there are, kGrams, 1 or 2, and
//   begin(item)                     before the others
//   row(at), column(at)             what a weight takes from the row's and from the column's side: a Side
//   weight(row, column, s, t, itself)
template <class T, class Weights>
struct WeightsKernel : PairSets<T> {
  bool within;  // y is x
  WeightsOfPairs<T> to;
  int row_tiles;  // of this launch
  int tiles;      // of an item
  int stages;
  Weights weights;
};

template <class T, class Weights>
struct WeightsLayout {
  using Tile = CosineTile<T>;
  static constexpr int kBlocks = sizeof(T) == 2 && Weights::kGrams == 1 ? 2 : 1;
  static constexpr int kStride = row_stride<T>(Tile::kSize);  // of the tile of weights, in the ring's place
  static_assert(Tile::kSize * kStride <= 2 * Tile::kStage);
  static constexpr int kNorms = PairProducts<T, Weights::kGrams>::kNorms,
                       kSums = (2 + Tile::kDown) * Tile::kSize;
  static constexpr int64_t kOthers = (kNorms + kSums) * int64_t(sizeof(Acc<T>));
};

// weights[i, j] = weight(S[i, j], T[i, j]), S of x and y, T of z; along[tile, i] = sum over the tile's j of
// weights[i, j] S[i, j].
template <class T, class Weights>
KERNEL LAUNCH_BOUNDS(CosineTile<T>::kThreads, (WeightsLayout<T, Weights>::kBlocks))
    weight_tile(WeightsKernel<T, Weights> a) {
  using Tile = CosineTile<T>;
  using Layout = WeightsLayout<T, Weights>;
  using A = Acc<T>;
  constexpr int grams = Weights::kGrams;
  const int n = a.x.count, m = a.y.count, rows = a.to.rows;
  const bool triangle = a.to.triangle;
  const auto [row_tile, column_tile] = tile_place(block_x() % a.tiles, a.row_tiles, a.to.slots, triangle);
  const int64_t local = block_x() / a.tiles, item = a.to.first_item + local;
  const int row0 = a.to.first_row + row_tile * Tile::kSize, column0 = column_tile * Tile::kSize;
  Carver carve;
  const Shared<T> memory = carve.take<T>(a.stages * Tile::kStage);
  PairProducts<T, grams> made{carve.take<A>(Layout::kNorms), {}, {}, {}};
  const Shared<A> row_sums = carve.take<A>(2 * Tile::kSize),
                  column_sums = carve.take<A>(Tile::kDown * Tile::kSize);
  const auto part = CosinePart<T>::of_tile(row0, column0, n, m, triangle);
  made.make(a, {memory, a.stages, Tile::kStage, Tile::kSize}, part, item, row0, column0,
            a.within && row0 == column0);
  sync_block();  // weights take the place of the ring

  Weights weights = a.weights;
  weights.begin(item);
  A along[2][2] = {}, inverse_norm[2][2], z_inverse_norm[2][2];
  typename Weights::Side row_side[2][2];
  UNROLLED_FOR (int r = 0; r < 2; ++r)
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const int at = part.row + 16 * r + tile_row(2 * i);
      inverse_norm[r][i] = made.inverse_norm(0, 0, at);
      z_inverse_norm[r][i] = made.inverse_norm(grams - 1, 0, at);
      row_side[r][i] = weights.row(item * n + (row0 + at < n ? row0 + at : 0));
    }
  UNROLLED_FOR (int g = 0; g < Tile::kGroups; ++g) {
    const bool active = g >= part.first && g < part.end;
    const bool mirrored = triangle && active && column0 + part.column + 32 * g > row0 + part.row;
    UNROLLED_FOR (int h = 0; h < 2; ++h)
      UNROLLED_FOR (int j = 0; j < 2; ++j) {
        const int column = part.column + 32 * g + 16 * h + 8 * j + tile_col(0), to = column0 + column;
        A sum[2] = {};
        sync_warp();  // keeps the compiler from loading what other columns need, too
        if (active) {
          A w[2][2][2];
          UNROLLED_FOR (int e = 0; e < 2; ++e) {
            const A of_column = made.inverse_norm(0, 1, column + e),
                    z_of_column = made.inverse_norm(grams - 1, 1, column + e);
            const auto column_side = weights.column(item * m + (to + e < m ? to + e : 0));
            UNROLLED_FOR (int r = 0; r < 2; ++r)
              UNROLLED_FOR (int i = 0; i < 2; ++i) {
                const int from = row0 + part.row + 16 * r + tile_row(2 * i), at = 2 * i + e;
                // the product of the inverse norms first: equal pairs then have equal cosines
                const A cosine = made.s[g][h][r][j][at] * (inverse_norm[r][i] * of_column);
                A t = 0;
                if constexpr (grams == 2) t = made.t[g][h][r][j][at] * (z_inverse_norm[r][i] * z_of_column);
                const A weight = from < n && to + e < m
                                     ? weights.weight(row_side[r][i], column_side, cosine, t, from == to + e)
                                     : A(0);
                w[r][i][e] = weight;
                along[r][i] += weight * cosine;
                sum[e] += weight * cosine;
              }
          }
          UNROLLED_FOR (int r = 0; r < 2; ++r)
            UNROLLED_FOR (int i = 0; i < 2; ++i)
              store2(memory, (part.row + 16 * r + tile_row(2 * i)) * Layout::kStride + column, w[r][i][0],
                     w[r][i][1]);
        }
        if (!triangle) continue;
        UNROLLED_FOR (int e = 0; e < 2; ++e) {
          if (mirrored)
            UNROLLED_FOR (int mask = 4; mask < 32; mask *= 2) sum[e] += warp_shuffle_xor(sum[e], mask);
          if (lane_id() < 4)
            column_sums.st(part.row / 32 * Tile::kSize + column + e, mirrored ? sum[e] : A(0));
        }
      }
  }
  UNROLLED_FOR (int r = 0; r < 2; ++r)
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const A sum = quad_sum(along[r][i]);
      if ((lane_id() & 3) == 0)
        row_sums.st(part.column / (32 * Tile::kGroups) * Tile::kSize + part.row + 16 * r + tile_row(2 * i),
                    sum);
    }
  sync_block();

  const int64_t first = local * rows - a.to.first_row;
  constexpr int pieces = Tile::kSize / kPiece<T>;
  ROLLED_FOR (int p = thread_x(); p < Tile::kSize * pieces; p += Tile::kThreads) {
    const int row = p / pieces, column = p % pieces * kPiece<T>;
    const bool below = triangle && (column0 + column) / 32 < (row0 + row) / 32;
    if (row0 + row < n && column0 + column < a.to.stride && !below)
      a.to.weights.template st<uint4>((first + row0 + row) * a.to.stride + column0 + column,
                                      memory.template ld<uint4>(row * Layout::kStride + column));
  }
  ROLLED_FOR (int c = thread_x(); c < Tile::kSize; c += Tile::kThreads) {
    A of_row = row_sums.ld(c) + row_sums.ld(Tile::kSize + c), of_column = 0;
    if (triangle)
      for (int w = 0; w < Tile::kDown; ++w) of_column += column_sums.ld(w * Tile::kSize + c);
    if (triangle && row_tile == column_tile) of_row += of_column;  // of the squares below the diagonal
    const int64_t slots = local * a.to.slots;
    if (row0 + c < n) a.to.along.st((slots + column_tile) * rows + row0 + c - a.to.first_row, of_row);
    if (triangle && row_tile != column_tile && column0 + c < m)
      a.to.along.st((slots + row_tile) * rows + column0 + c, of_column);
  }
}

// factor dsums weights ŷ / ranges, then through the norm.
template <class T>
struct WeightedProduct : Gradient<T> {
  Vectors<T> y;                          // [items, M, D]
  Global<const Acc<T>> y_inverse_norms;  // [items, M]
  WeightsOfPairs<T> from;
  Acc<T> factor;
  Global<const Acc<T>> dsums, ranges;  // [items], or null: 1
};

template <class T>
void launch_weighted_product(const char* operation, const WeightedProduct<T>& a, int64_t items, void* stream);

// `a` lacks what `to` says, `product` has the last three of its own, and inverse_eps.
template <class T, class Weights>
void launch_weighted(const char* operation, WeightsKernel<T, Weights>& a, WeightedProduct<T>& product,
                     const char* name, const BatchView& dx, int64_t items, const WeightsPlan& plan,
                     T* weights, Acc<T>* along, void* stream) {
  using Tile = CosineTile<T>;
  using Layout = WeightsLayout<T, Weights>;
  const int64_t stage = Tile::kStage * int64_t(sizeof(T)), n = a.x.count;
  a.stages = stages_of(operation, stage, Layout::kOthers, Layout::kBlocks);
  product.x = a.x, product.y = a.y;
  product.x_inverse_norms = a.x_inverse_norms, product.y_inverse_norms = a.y_inverse_norms;
  set_gradient<T, TallLayout<T>>(product, name, dx, items);
  WeightsOfPairs<T>& to = a.to;
  to.triangle = a.within && plan.rows == n;
  to.stride = static_cast<int>(plan.stride), to.slots = static_cast<int>(plan.slots);
  to.weights = {weights}, to.along = {along};
  for (int64_t item = 0; item < items; item += plan.items)
    for (int64_t row = 0; row < n; row += plan.rows) {
      const int64_t some = std::min(plan.items, items - item);
      to.first_item = item, to.first_row = static_cast<int>(row);
      to.rows = static_cast<int>(std::min(plan.rows, n - row));
      a.row_tiles = static_cast<int>(ceil_div(to.rows, Tile::kSize));
      product.row_tiles = static_cast<int>(ceil_div(to.rows, TallLayout<T>::kRows));
      a.tiles = to.triangle ? a.row_tiles * (a.row_tiles + 1) / 2 : a.row_tiles * to.slots;
      product.from = to;
      launch(operation, weight_tile<T, Weights>, some * a.tiles, Tile::kThreads,
             a.stages * stage + Layout::kOthers, stream, a);
      launch_weighted_product(operation, product, some, stream);
    }
}

}  // namespace vitdiv::cuda
