// Reductions along the rows of cosines of all pairs, forward: log-sum-exp, and the index of the largest; the
// maths is in vitdiv_kernels/ops/pairs/pairwise_rows/README.md.
//
// A block makes a tile of cosines and reduces it along its rows and, of pairs within x, along its columns:
// then only the upper triangle is made. Each vector has a slot of its own for each tile of others, of two
// numbers: the largest value, and the sum of exponentials below it or the place of the largest. A second
// kernel merges a vector's slots in order.
#include "pairwise_rows.cuh"

namespace vitdiv::cuda {
namespace {

constexpr int kMergedRows = 256;  // vectors whose slots a block merges
// Exponents below this, scale times a cosine, are at most twice that apart: exp of the difference is no
// underflow, so that the bound itself can stand for the largest.
template <class A>
constexpr double kBoundedScale = sizeof(A) == 8 ? 300 : 40;

enum class Reduction { kNearest, kBounded, kLargest };  // the latter two: log-sum-exp

template <class A>
DEVICE A lowest() {
  if constexpr (sizeof(A) == 8)
    return -1e308;
  else
    return -3e38f;
}
template <class A>
DEVICE A exponential(A x) {
  return fast_exp2(x * A(1.4426950408889634));
}
DEVICE float logarithm(float x) { return logf(x); }
DEVICE double logarithm(double x) { return log(x); }

// A vector's two numbers over a part of the others.
template <class A>
struct Reduced {
  A top, rest;

  DEVICE static Reduced none() { return {lowest<A>(), A(0)}; }
  // With those of a later part.
  DEVICE void merge(Reduction reduction, const Reduced& other) {
    if (reduction == Reduction::kNearest) {
      if (other.top > top) *this = other;
      return;
    }
    const A both = larger(top, other.top);
    rest = rest * exponential(top - both) + other.rest * exponential(other.top - both);
    top = both;
  }
};

// What a value adds to the rest, if `top` is the largest of all; `place` is among the others of the tile.
template <class A>
DEVICE A rest_of(Reduction reduction, A value, A top, int place) {
  if (reduction == Reduction::kBounded) return value;
  if (reduction == Reduction::kLargest) return exponential(value - top);
  return value == top ? A(place) : A(1 << 20);
}
template <class A>
DEVICE A add_rests(Reduction reduction, A x, A y) {
  return reduction == Reduction::kNearest ? (y < x ? y : x) : x + y;
}

template <class T>
struct RowsKernel {
  Vectors<T> x;                          // [items, N, D]
  Vectors<T> y;                          // [items, M, D]
  Global<const Acc<T>> x_inverse_norms;  // [items, N]
  Global<const Acc<T>> y_inverse_norms;  // [items, M]
  Global<Acc<T>> slots;                  // [items, 2, column tiles, N]
  int row_tiles;
  int column_tiles;
  int tiles;       // of an item
  int stages;      // of the products' ring in shared memory
  bool within;     // y is x
  bool symmetric;  // only the upper triangle is made
  Reduction reduction;
  Acc<T> scale;
};

// S[i, j] = x̂_i . ŷ_j; of row i over the tile's j: max_j S and its place, or max_j and
// sum_j exp(scale S[i, j] - max), where the maximum may be its bound.
template <class T>
KERNEL LAUNCH_BOUNDS(CosineTile<T>::kThreads, 1) rows_tile(RowsKernel<T> a) {
  using Tile = CosineTile<T>;
  using A = Acc<T>;
  const int lane = lane_id(), n = a.x.count, m = a.y.count;
  const Reduction reduction = a.reduction;
  const bool nearest = reduction == Reduction::kNearest, bounded = reduction == Reduction::kBounded;
  const auto [row_tile, column_tile] =
      tile_place(block_x() % a.tiles, a.row_tiles, a.column_tiles, a.symmetric);
  const int64_t item = block_x() / a.tiles;
  const int row0 = row_tile * Tile::kSize, column0 = column_tile * Tile::kSize;
  Carver carve;
  const CosineProducts<T> products{carve.take<T>(a.stages * Tile::kStage), a.stages, Tile::kStage,
                                   Tile::kSize};
  const Shared<A> row_tops = carve.take<A>(2 * Tile::kSize), row_rests = carve.take<A>(2 * Tile::kSize),
                  column_tops = carve.take<A>(Tile::kDown * Tile::kSize),
                  column_rests = carve.take<A>(Tile::kDown * Tile::kSize);
  const auto part = CosinePart<T>::of_tile(row0, column0, n, m, a.symmetric);
  CosineSums<T> acc = {};
  const auto inverse_norm_of = [&](int set, int i) {
    const int at = (set ? column0 : row0) + i, count = set ? m : n;
    return at < count ? (set ? a.y_inverse_norms : a.x_inverse_norms).ld(item * count + at) : A(0);
  };
  const auto powers = Powers<T>::of_tile(Tile::kSize, inverse_norm_of);
  products.add(acc, part, a.x, item * a.x.item, row0, a.y, item * a.y.item, column0,
               a.within && row_tile == column_tile, powers, inverse_norm_of, [](int) {});

  const int row = row0 + part.row;
  const A nothing = bounded ? A(0) : -A(INFINITY);  // the value of a pair that does not count
  A inverse_norm[2][2], top[2][2];
  UNROLLED_FOR (int r = 0; r < 2; ++r)
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const int at = row + 16 * r + tile_row(2 * i);
      inverse_norm[r][i] = at < n ? powers.left_of(a.x_inverse_norms.ld(item * n + at)) : A(0);
      top[r][i] = bounded ? a.scale : lowest<A>();
    }
  UNROLLED_FOR (int g = 0; g < Tile::kGroups; ++g) {
    const bool active = g >= part.first && g < part.end;
    const int column = column0 + part.column + 32 * g;
    const bool mirrored = a.symmetric && active && column > row;
    UNROLLED_FOR (int h = 0; h < 2; ++h)
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        UNROLLED_FOR (int e = 0; e < 2; ++e) {
          const int to = column + 16 * h + 8 * j + tile_col(e);
          const A column_inverse_norm = to < m ? powers.left_of(a.y_inverse_norms.ld(item * m + to)) : A(0);
          A column_top = bounded ? a.scale : lowest<A>();
          UNROLLED_FOR (int r = 0; r < 2; ++r)
            UNROLLED_FOR (int i = 0; i < 2; ++i) {
              const int from = row + 16 * r + tile_row(2 * i);
              // the product of the inverse norms first: then the cosines of equal vectors are equal, also
              // across the diagonal
              A value = acc[g][h][r][j][2 * i + e] * (inverse_norm[r][i] * column_inverse_norm);
              if (nearest)
                value = value == value ? value : A(INFINITY);
              else
                value *= a.scale;
              if (bounded) value = exponential(value - a.scale);
              if (!active || from >= n || to >= m || (a.within && from == to)) value = nothing;
              acc[g][h][r][j][2 * i + e] = value;
              if (bounded) continue;
              top[r][i] = larger(top[r][i], value);
              column_top = larger(column_top, value);
            }
          if (!a.symmetric) continue;
          Reduced<A> column_part = Reduced<A>::none();
          if (mirrored) {
            if (!bounded)
              UNROLLED_FOR (int mask = 4; mask < 32; mask *= 2)
                column_top = larger(column_top, warp_shuffle_xor(column_top, mask));
            A rest = 0;
            UNROLLED_FOR (int r = 0; r < 2; ++r)
              UNROLLED_FOR (int i = 0; i < 2; ++i) {
                const A one = rest_of(reduction, acc[g][h][r][j][2 * i + e], column_top,
                                      part.row + 16 * r + tile_row(2 * i));
                rest = r + i == 0 ? one : add_rests(reduction, rest, one);
              }
            UNROLLED_FOR (int mask = 4; mask < 32; mask *= 2)
              rest = add_rests(reduction, rest, warp_shuffle_xor(rest, mask));
            column_part = {column_top, rest};
          }
          if (lane < 4) {
            column_tops.st(part.row / 32 * Tile::kSize + to - column0, column_part.top);
            column_rests.st(part.row / 32 * Tile::kSize + to - column0, column_part.rest);
          }
        }
  }
  const int across = part.column / (32 * Tile::kGroups);
  UNROLLED_FOR (int r = 0; r < 2; ++r)
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const A largest = bounded ? a.scale : quad_max(top[r][i]);
      A rest = nearest ? A(1 << 20) : A(0);
      UNROLLED_FOR (int g = 0; g < Tile::kGroups; ++g)
        UNROLLED_FOR (int h = 0; h < 2; ++h)
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            UNROLLED_FOR (int e = 0; e < 2; ++e)
              rest = add_rests(reduction, rest,
                               rest_of(reduction, acc[g][h][r][j][2 * i + e], largest,
                                       part.column + 32 * g + 16 * h + 8 * j + tile_col(e)));
      UNROLLED_FOR (int mask = 1; mask < 4; mask *= 2)
        rest = add_rests(reduction, rest, warp_shuffle_xor(rest, mask));
      if ((lane & 3) == 0) {
        const int at = across * Tile::kSize + part.row + 16 * r + tile_row(2 * i);
        row_tops.st(at, largest);
        row_rests.st(at, rest);
      }
    }
  sync_block();

  const auto keep = [&](int others, int at, const Reduced<A>& reduced) {
    const int64_t slot = (item * 2 * a.column_tiles + others) * n + at;
    a.slots.st(slot, reduced.top);
    a.slots.st(slot + int64_t(a.column_tiles) * n, reduced.rest);
  };
  for (int c = thread_x(); c < Tile::kSize; c += threads()) {
    Reduced<A> of_row = Reduced<A>::none(), of_column = of_row;
    if (a.symmetric)
      for (int w = 0; w < Tile::kDown; ++w)
        of_column.merge(reduction,
                        {column_tops.ld(w * Tile::kSize + c), column_rests.ld(w * Tile::kSize + c)});
    if (a.symmetric && row_tile == column_tile) of_row = of_column;  // of the squares below the diagonal
    for (int w = 0; w < 2; ++w)
      of_row.merge(reduction, {row_tops.ld(w * Tile::kSize + c), row_rests.ld(w * Tile::kSize + c)});
    if (row0 + c < n) keep(column_tile, row0 + c, of_row);
    if (a.symmetric && row_tile != column_tile && column0 + c < m) keep(row_tile, column0 + c, of_column);
  }
}

// rows[i] = log sum_j exp(scale S[i, j]), or nearest[i] = argmax_j S[i, j], from the vector's slots.
template <class A>
KERNEL LAUNCH_BOUNDS(kMergedRows, 1)
    merge_slots(Global<const A> slots, Global<A> rows, Global<int64_t> nearest, int64_t count, int n,
                int tiles, int size, Reduction reduction) {
  const int64_t at = int64_t(block_x()) * threads() + thread_x();
  if (at >= count) return;
  const int64_t first = at / n * 2 * tiles * n + at % n;
  Reduced<A> reduced = Reduced<A>::none();
  int tile = 0;
  for (int t = 0; t < tiles; ++t) {
    const int64_t slot = first + int64_t(t) * n;
    const Reduced<A> next{slots.ld(slot), slots.ld(slot + int64_t(tiles) * n)};
    if (next.top > reduced.top) tile = t;
    reduced.merge(reduction, next);
  }
  if (reduction == Reduction::kNearest)
    nearest.st(at, int64_t(tile) * size + static_cast<int>(reduced.rest));
  else
    rows.st(at, reduced.top + logarithm(reduced.rest));
}

// Places in scratch, in bytes.
struct Places : Pieces {
  int64_t inverse_norms[2], slots;
  explicit Places(const RowsArgs& args) : Pieces(args.x.dtype) {
    const int64_t tile =
        with_type(args.x.dtype, [](auto number) { return int64_t(CosineTile<decltype(number)>::kSize); });
    inverse_norms[0] = inverse_norms[1] = take(args.L * args.N);
    if (args.y.data) inverse_norms[1] = take(args.L * args.M);
    slots = take(2 * args.L * ceil_div(args.M, tile) * args.N);
  }
};

template <class T>
void reduce_rows(const char* operation, const RowsArgs& args, Reduction reduction, void* rows,
                 int64_t* nearest, void* scratch, void* stream) {
  using A = Acc<T>;
  using Tile = CosineTile<T>;
  const Places at(args);
  const CosineArgs sets = vectors_of(args);
  const auto place = [&](int64_t byte) { return place_in<A>(scratch, byte); };
  for (int s = 0; s < (args.y.data ? 2 : 1); ++s)
    vector_inverse_norms(operation, sets, s, place(at.inverse_norms[s]), stream);
  RowsKernel<T> a{};
  a.x = set_of<T>(sets, 0);
  a.y = set_of<T>(sets, 1);
  a.x_inverse_norms = {place(at.inverse_norms[0])};
  a.y_inverse_norms = {place(at.inverse_norms[1])};
  a.slots = {place(at.slots)};
  a.within = !args.y.data;
  // Three products of tf32 parts are added in another order across the diagonal, where the cosines of equal
  // vectors would not be equal.
  a.symmetric = a.within && (sizeof(T) != 4 || reduction != Reduction::kNearest);
  a.reduction = reduction;
  a.scale = static_cast<A>(args.scale);
  a.row_tiles = static_cast<int>(ceil_div(args.N, Tile::kSize));
  a.column_tiles = static_cast<int>(ceil_div(args.M, Tile::kSize));
  a.tiles = a.symmetric ? a.row_tiles * (a.row_tiles + 1) / 2 : a.row_tiles * a.column_tiles;
  const int64_t stage = Tile::kStage * int64_t(sizeof(T)),
                others = 2 * (2 + Tile::kDown) * Tile::kSize * int64_t(sizeof(A));
  a.stages = stages_of(operation, stage, others, 2);
  launch(operation, rows_tile<T>, args.L * a.tiles, Tile::kThreads, a.stages * stage + others, stream, a);
  launch(operation, merge_slots<A>, ceil_div(args.L * args.N, kMergedRows), kMergedRows, 0, stream,
         Global<const A>{a.slots.p}, Global<A>{static_cast<A*>(rows)}, Global<int64_t>{nearest},
         args.L * args.N, static_cast<int>(args.N), a.column_tiles, Tile::kSize, reduction);
}

}  // namespace

int64_t pairwise_logsumexp_fwd_scratch(const LogSumExpForward& args) { return Places(args).size; }

void pairwise_logsumexp_fwd(const LogSumExpForward& args, void* scratch, void* stream) {
  if (args.L == 0) return;
  check_sizes(args);
  with_type(args.x.dtype, [&](auto number) {
    using T = decltype(number);
    const bool bounded = args.scale <= kBoundedScale<Acc<T>>;
    reduce_rows<T>("pairwise_logsumexp_fwd", args, bounded ? Reduction::kBounded : Reduction::kLargest,
                   args.rows, nullptr, scratch, stream);
  });
}

int64_t pairwise_nearest_scratch(const NearestForward& args) { return Places(args).size; }

void pairwise_nearest(const NearestForward& args, void* scratch, void* stream) {
  if (args.L == 0) return;
  check_sizes(args);
  with_type(args.x.dtype, [&](auto number) {
    reduce_rows<decltype(number)>("pairwise_nearest", args, Reduction::kNearest, nullptr, args.nearest,
                                  scratch, stream);
  });
}

}  // namespace vitdiv::cuda
