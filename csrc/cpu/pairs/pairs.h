// Tiles of the products of all pairs of vectors, for kernels that reduce them and add up gradients from them.
//
// A tile of pairs (i, j) adds to what belongs to the rows i and to the rows j. The tiles are walked in
// rounds, within which no two tiles have rows in common: threads that share an item need no partial results,
// and every number is added up in one order, whatever their count.
#pragma once

#include "../core/vectors.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

// A set's rows in tiles of equal size, whole panels.
template <class T>
struct Tiling {
  int64_t rows, count, size;
  explicit Tiling(int64_t n)
      : rows(n), count(ceil_div(n, kTile)), size(count ? round_up(ceil_div(n, count), kPanel<T>) : 0) {}
  int64_t begin(int64_t t) const { return t * size; }
  int64_t length(int64_t t) const { return max64(0, min64(size, rows - t * size)); }
};

struct TileOf {
  int64_t row, column;  // -1: none
};

// All tiles of two sets.
struct AllTiles {
  int64_t rows, columns;
  int64_t rounds() const { return max64(rows, columns); }
  int64_t per_round() const { return rows; }
  TileOf at(int64_t round, int64_t task) const {
    const int64_t column = (task + round) % rounds();
    return {task, column < columns ? column : -1};
  }
};

// Those of one set on and above the diagonal: the diagonal, then a tournament of the rest.
struct UpperTiles {
  int64_t tiles, players;  // odd: with an even count the last tile plays against the one that is left over
  explicit UpperTiles(int64_t count) : tiles(count), players(count - (count + 1) % 2) {}
  int64_t rounds() const { return 1 + (tiles > 1 ? players : 0); }
  int64_t per_round() const { return tiles; }
  TileOf at(int64_t round, int64_t task) const {
    if (round == 0) return {task, task};
    const int64_t alone = round - 1;
    if (task == 0) return tiles == players ? TileOf{-1, -1} : TileOf{alone, tiles - 1};
    if (2 * task >= players) return {-1, -1};
    const int64_t a = (alone + task) % players, b = (alone - task + players) % players;
    return {min64(a, b), max64(a, b)};
  }
};

// body(0) ... body(count - 1), shared among the threads if they work on one item as a team; then they wait
// for each other.
template <class Body>
VITDIV_INLINE void each(bool team, int64_t count, const Body& body) {
  if (team) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) body(i);
  } else {
    for (int64_t i = 0; i < count; i++) body(i);
  }
}

template <class Tiles, class Body>
VITDIV_INLINE void each_tile(bool team, const Tiles& tiles, const Body& body) {
  for (int64_t round = 0; round < tiles.rounds(); round++)
    each(team, tiles.per_round(), [&](int64_t task) {
      const TileOf tile = tiles.at(round, task);
      if (tile.row >= 0 && tile.column >= 0) body(tile.row, tile.column);
    });
}

// kernel.run(item, memory of an item, memory of a thread, team) for all items: each by one thread or, where
// that would leave threads idle, one after another by all threads. False without memory.
template <class Kernel>
bool for_each_item(const Kernel& kernel, int64_t L, int threads) {
  const bool team = pieces_per_item(L, threads, 2) > 1;
  const int64_t items = team ? 1 : threads;
  Arena item_bytes, thread_bytes;
  (void)typename Kernel::Item(item_bytes, kernel);
  (void)typename Kernel::Own(thread_bytes, kernel);
  const Block block(items * item_bytes.used() + threads * thread_bytes.used());
  if (!block.data()) return false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t thread = thread_index();
    Arena of_item(block.data() + (team ? 0 : thread) * item_bytes.used());
    Arena of_thread(block.data() + items * item_bytes.used() + thread * thread_bytes.used());
    const typename Kernel::Item m(of_item, kernel);
    const typename Kernel::Own own(of_thread, kernel);
    if (team) {
      for (int64_t item = 0; item < L; item++) kernel.run(item, m, own, true);
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < L; item++) kernel.run(item, m, own, false);
    }
  }
  return true;
}

// One item's rows, as unit vectors unless they are taken as they are, in the layouts that products read.
template <class T>
struct PackedSet {
  int64_t count, D;
  T* rows;           // [count, D]: left factors of S
  T* columns;        // panels of their transpose: right factors of S; or null
  T* panels;         // panels of D columns: right factors of gradients; or null
  T* inverse_norms;  // what each was multiplied by
  T* radial;         // 1 where that was one over its norm, else 0

  PackedSet(Arena& arena, int64_t n, int64_t width, bool with_columns, bool with_panels)
      : count(n),
        D(width),
        rows(arena.take<T>(n * width)),
        columns(with_columns ? arena.take<T>(packed_size<T>(n, width)) : nullptr),
        panels(with_panels ? arena.take<T>(packed_size<T>(width, n)) : nullptr),
        inverse_norms(arena.take<T>(n)),
        radial(arena.take<T>(n)) {}

  // Rows `first` (a multiple of kPanel) to `first` + n.
  void pack(const Set& set, int64_t item, int64_t first, int64_t n, bool normalise, T eps) const {
    for (int64_t i = first; i < first + n; i++) {
      T* z = rows + i * D;
      const T* x = raw_rows(set, item, i, 1, D, z).data;
      const Vector<T> v = normalise ? vector_of(D, x, eps, z) : Vector<T>{x, T(1), T(1), T(1), false};
      inverse_norms[i] = v.inverse_norm;
      radial[i] = v.radial ? T(1) : T(0);
      for (int64_t k = 0; k < D; k++) z[k] = v.data[k] * v.to_unit;
      if (panels) pack_row(D, z, i, count, panels);
    }
    for (int64_t j = first; columns && j < first + n; j += kPanel<T>)
      pack_transposed(min64(kPanel<T>, first + n - j), D, rows + j * D, D, columns + j * D);
  }

  // dz, the gradient of row i, through the normalisation: (dz - z (z . dz)) / |x|, or dz / eps for |x| <=
  // eps.
  void finish(int64_t i, const T* dz, T factor, T* dx) const {
    const T *z = rows + i * D, along = radial[i] != 0 ? dot(D, z, dz) : T(0);
    factor *= inverse_norms[i];
    for (int64_t k = 0; k < D; k++) dx[k] = factor * (dz[k] - z[k] * along);
  }
};

constexpr int64_t kDepth = 384;  // of a product of vectors at a time: the panel stays in L1

// s [n, ld] = rows i ... i + n of x times columns j ... j + width of y.
template <class T>
void product_tile(const PackedSet<T>& x, int64_t i, int64_t n, const PackedSet<T>& y, int64_t j,
                  int64_t width, T* s, int64_t ld = kTileStride<T>) {
  for (int64_t k = 0; k < x.D; k += kDepth)
    gemm<T, false>(n, width, min64(kDepth, x.D - k), x.rows + i * x.D + k, x.D,
                   Panels<T>{y.columns + j * x.D + k * kPanel<T>, x.D}, s, ld, k > 0);
}

// The same of rows i ... i + n with themselves, of which the upper half is computed.
template <class T>
void diagonal_tile(const PackedSet<T>& x, int64_t i, int64_t n, T* s) {
  for (int64_t j = 0; j < n; j += kPanel<T>)
    product_tile(x, i, min64(n, j + kPanel<T>), x, i + j, min64(kPanel<T>, n - j), s + j);
  mirror_upper(n, s, kTileStride<T>);
}

// Gradients that the slopes w [n, width] of a tile give: dx of rows i ... += w y, dy of rows j ... += w^T x.
// Their rows are whole vectors.
template <class T>
void add_to_rows(const T* w, int64_t n, int64_t width, const PackedSet<T>& y, int64_t j, T* dx) {
  gemm<T, false>(n, y.D, width, w, kTileStride<T>, Panels<T>{y.panels + j * kPanel<T>, y.count}, dx,
                 round_up(y.D, kLanes<T>), true);
}

template <class T>
void add_to_columns(const T* w, int64_t n, int64_t width, const PackedSet<T>& x, int64_t i, T* dy) {
  gemm<T, true>(width, x.D, n, w, kTileStride<T>, Panels<T>{x.panels + i * kPanel<T>, x.count}, dy,
                round_up(x.D, kLanes<T>), true);
}

// Row i of an item of `out` = factor * row. `copy` holds one row.
template <class T>
void store_scaled(int64_t width, T factor, const T* row, const BatchView& out, int64_t item, int64_t i,
                  T* copy) {
  const int64_t offset = out.offset[item] + i * out.stride_n;
  const bool direct = is_native<T>(out.dtype);
  T* scaled = direct ? static_cast<T*>(out.data) + offset : copy;
  for (int64_t k = 0; k < width; k++) scaled[k] = factor * row[k];
  if (!direct) store_row(copy, width, out.data, out.dtype, offset);
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
