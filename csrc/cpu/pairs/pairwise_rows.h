// What the reductions along rows of cosines share: tiles of S, which stay in cache. For pairs within x only
// those of the upper triangle are made, each serving its rows and, as columns, those of the tile that mirrors
// it.
#pragma once

#include "pairs.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {

// The forward of two sets that also fills `saved`.
bool logsumexp_with_gradients(const LogSumExpForward& args);

namespace {

template <class T>
constexpr T kLog2e = T(1.4426950408889634074);

VITDIV_INLINE bool within(const RowsArgs& a) { return !a.y.data; }
VITDIV_INLINE Set rows_set(const RowsArgs& a) { return {a.x, a.N}; }
VITDIV_INLINE Set columns_set(const RowsArgs& a) { return {a.y, a.M}; }

// The tiles of one set or of two, and the products in them.
template <class T>
struct PairTiles {
  const RowsArgs& a;
  Tiling<T> rows, columns;
  explicit PairTiles(const RowsArgs& args) : a(args), rows(args.N), columns(args.M) {}

  template <class Body>
  void each_pack(bool team, int64_t item, const PackedSet<T>& x, const PackedSet<T>& y,
                 const Body& body) const {
    each(team, max64(rows.count, columns.count), [&](int64_t t) {
      if (t < rows.count) x.pack(rows_set(a), item, rows.begin(t), rows.length(t), true, T(a.eps));
      if (!within(a) && t < columns.count)
        y.pack(columns_set(a), item, columns.begin(t), columns.length(t), true, T(a.eps));
      body(t);
    });
  }

  // body(i, n, j, width) with the tile's cosines in s; the self-pairs of a tile on the diagonal (i == j) are
  // `self`.
  template <class Body>
  void each_tile(bool team, const PackedSet<T>& x, const PackedSet<T>& y, T* s, T self,
                 const Body& body) const {
    const auto visit = [&](int64_t row, int64_t column) {
      const int64_t i = rows.begin(row), n = rows.length(row);
      const int64_t j = columns.begin(column), width = columns.length(column);
      if (within(a) && i == j) {
        diagonal_tile(x, i, n, s);
        for (int64_t r = 0; r < n; r++) s[r * kTileStride<T> + r] = self;
      } else {
        product_tile(x, i, n, within(a) ? x : y, j, width, s);
      }
      body(i, n, j, width);
    };
    if (within(a))
      vitdiv::VITDIV_CPU_NAMESPACE::each_tile(team, UpperTiles(rows.count), visit);
    else
      vitdiv::VITDIV_CPU_NAMESPACE::each_tile(team, AllTiles{rows.count, columns.count}, visit);
  }
};

VITDIV_INLINE float log_of(float x) { return __builtin_logf(x); }
VITDIV_INLINE double log_of(double x) { return __builtin_log(x); }

template <template <class> class Kernel, class Args>
bool dispatch(const Args& args) {
  return args.x.dtype == ScalarType::kDouble ? for_each_item(Kernel<double>(args), args.L, args.threads)
                                             : for_each_item(Kernel<float>(args), args.L, args.threads);
}

}  // namespace

}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
