// Reductions along the rows of the cosines of all pairs of vectors; the maths is in vitdiv_kernels/ops/pairwise_rows/README.md.
//
// Tiles of S stay in cache; for pairs within x only those of the upper triangle are made, each serving its rows and, as columns,
// those of the tile that mirrors it.
#include "pairs.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
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

  // body(i, n, j, width) with the tile's cosines in s; the self-pairs of a tile on the diagonal (i == j) are `self`.
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

template <class T>
VITDIV_INLINE T exp2_of(T t) {
  return exp2_nonpositive<T>(broadcast(t))[0];
}

VITDIV_INLINE float log_of(float x) { return __builtin_logf(x); }
VITDIV_INLINE double log_of(double x) { return __builtin_log(x); }

// Of each row top, the largest cosine so far (or 1, a bound), and sum = sum_j exp(scale (S_ij - top)).
template <class T>
struct LogSumExp {
  static constexpr double kBoundedScale = 40;  // exp(-2 scale), the least term, is a normal float

  const LogSumExpForward& a;
  PairTiles<T> tiles;
  bool bounded;
  T factor;

  explicit LogSumExp(const LogSumExpForward& args)
      : a(args), tiles(args), bounded(args.scale <= kBoundedScale), factor(T(args.scale) * kLog2e<T>) {}

  struct Item {
    PackedSet<T> x, y;
    T *top, *sum;
    Item(Arena& arena, const LogSumExp& k)
        : x(arena, k.a.N, k.a.D, within(k.a), false),
          y(arena, within(k.a) ? 0 : k.a.M, k.a.D, true, false),
          top(arena.take<T>(round_up(k.a.N, kPanel<T>))),
          sum(arena.take<T>(round_up(k.a.N, kPanel<T>))) {}
  };
  struct Own {
    T *s, *mirrored;
    Own(Arena& arena, const LogSumExp&)
        : s(arena.take<T>(kTile * kTileStride<T>)), mirrored(arena.take<T>(kTile * kTileStride<T>)) {}
  };

  void run(int64_t item, const Item& m, const Own& own, bool team) const {
    const T infinity = T(__builtin_inff());
    tiles.each_pack(team, item, m.x, m.y, [&](int64_t t) {
      const int64_t i = tiles.rows.begin(t);
      for (int64_t r = i; r < i + tiles.rows.length(t); r++) {
        m.top[r] = bounded ? T(1) : -infinity;
        m.sum[r] = 0;
      }
    });
    tiles.each_tile(team, m.x, m.y, own.s, -infinity, [&](int64_t i, int64_t n, int64_t j, int64_t width) {
      const bool mirror = within(a) && i != j;
      if (bounded) {
        add_bounded(own.s, n, width, m.sum + i, mirror ? m.sum + j : nullptr);
        return;
      }
      if (mirror) turn(own.s, n, width, own.mirrored);
      add(own.s, n, width, m.top + i, m.sum + i);
      if (mirror) add(own.mirrored, width, n, m.top + j, m.sum + j);
    });
    T* rows = static_cast<T*>(a.rows) + item * a.N;
    each(team, tiles.rows.count, [&](int64_t t) {
      const int64_t i = tiles.rows.begin(t);
      for (int64_t r = i; r < i + tiles.rows.length(t); r++)
        rows[r] = T(a.scale) * m.top[r] + log_of(m.sum[r]);
    });
  }

 private:
  // out [width, kTileStride] = the transpose of s [n, kTileStride].
  static void turn(const T* s, int64_t n, int64_t width, T* out) {
    constexpr int64_t kBlock = 8;
    for (int64_t r0 = 0; r0 < n; r0 += kBlock)
      for (int64_t c0 = 0; c0 < width; c0 += kBlock) {
        const int64_t r1 = min64(n, r0 + kBlock), c1 = min64(width, c0 + kBlock);
#if defined(__AVX2__)
        if constexpr (sizeof(T) == 4) {
          if (r1 == r0 + kBlock && c1 == c0 + kBlock) {
            transpose_8x8(s + r0 * kTileStride<T> + c0, kTileStride<T>, out + c0 * kTileStride<T> + r0,
                          kTileStride<T>);
            continue;
          }
        }
#endif
        for (int64_t c = c0; c < c1; c++)
          for (int64_t r = r0; r < r1; r++) out[c * kTileStride<T> + r] = s[r * kTileStride<T> + c];
      }
  }

  // With the bound 1 in place of the largest cosine, a pair has the same term in its row and in its column.
  void add_bounded(const T* s, int64_t n, int64_t width, T* row_sums, T* column_sums) const {
    constexpr int V = kLanes<T>;
    T sums[kTile] = {};
    for (int64_t r = 0; r < n; r++, s += kTileStride<T>) {
      Vec<T> total = {};
      for (int64_t c = 0; c < width; c += V) {
        Vec<T> e = exp2_nonpositive<T>((load(s + c) - T(1)) * factor);
        if (c + V > width) e = first_lanes<T>(e, width - c, T(0));
        total += e;
        if (column_sums) store(sums + c, load(sums + c) + e);
      }
      row_sums[r] += sum_lanes<T>(total);
    }
    for (int64_t c = 0; column_sums && c < width; c++) column_sums[c] += sums[c];
  }

  void add(const T* s, int64_t n, int64_t width, T* tops, T* sums) const {
    constexpr int V = kLanes<T>;
    const T infinity = T(__builtin_inff());
    for (int64_t r = 0; r < n; r++, s += kTileStride<T>) {
      Vec<T> most = broadcast<T>(tops[r]);
      for (int64_t c = 0; c < width; c += V) {
        const Vec<T> v = c + V <= width ? load(s + c) : first_lanes<T>(load(s + c), width - c, -infinity);
        most = v > most ? v : most;
      }
      T top = tops[r];
      for (int v = 0; v < V; v++) top = most[v] > top ? most[v] : top;
      Vec<T> total = {};
      for (int64_t c = 0; c < width; c += V) {
        Vec<T> e = exp2_nonpositive<T>((load(s + c) - top) * factor);
        if (c + V > width) e = first_lanes<T>(e, width - c, T(0));
        total += e;
      }
      if (top != tops[r]) sums[r] *= exp2_of<T>((tops[r] - top) * factor);
      sums[r] += sum_lanes<T>(total);
      tops[r] = top;
    }
  }
};

// W_ij = scale drows_i exp(scale S_ij - rows_i), within x plus W_ji, is made again tile by tile.
template <class T>
struct LogSumExpGradient {
  const LogSumExpBackward& a;
  PairTiles<T> tiles;
  bool of_x, of_y;

  explicit LogSumExpGradient(const LogSumExpBackward& args)
      : a(args), tiles(args), of_x(args.dx.data), of_y(args.dy.data) {}

  struct Item {
    PackedSet<T> x, y;
    T *dx, *dy, *rate, *shift;  // scale drows, and rows in units of log 2
    Item(Arena& arena, const LogSumExpGradient& k)
        : x(arena, k.a.N, k.a.D, within(k.a), within(k.a) || k.of_y),
          y(arena, within(k.a) ? 0 : k.a.M, k.a.D, true, k.of_x),
          dx(k.of_x ? arena.take<T>(k.a.N * round_up(k.a.D, kLanes<T>)) : nullptr),
          dy(k.of_y ? arena.take<T>(k.a.M * round_up(k.a.D, kLanes<T>)) : nullptr),
          rate(arena.take<T>(round_up(k.a.N, kPanel<T>))),
          shift(arena.take<T>(round_up(k.a.N, kPanel<T>))) {}
  };
  struct Own {
    T *s, *row;
    Own(Arena& arena, const LogSumExpGradient& k)
        : s(arena.take<T>(kTile * kTileStride<T>)), row(arena.take<T>(k.a.D)) {}
  };

  void run(int64_t item, const Item& m, const Own& own, bool team) const {
    const int64_t ld = round_up(a.D, kLanes<T>);
    tiles.each_pack(team, item, m.x, m.y, [&](int64_t t) {
      const T* drows = static_cast<const T*>(a.drows) + item * a.N;
      const T* rows = static_cast<const T*>(a.rows) + item * a.N;
      const int64_t i = tiles.rows.begin(t), n = tiles.rows.length(t);
      for (int64_t r = i; r < i + n; r++) {
        m.rate[r] = T(a.scale) * drows[r];
        m.shift[r] = kLog2e<T> * rows[r];
      }
      if (m.dx && n > 0) memset(m.dx + i * ld, 0, size_t(n * ld) * sizeof(T));
      const int64_t width = tiles.columns.length(t);
      if (m.dy && width > 0) memset(m.dy + tiles.columns.begin(t) * ld, 0, size_t(width * ld) * sizeof(T));
    });
    tiles.each_tile(team, m.x, m.y, own.s, T(0), [&](int64_t i, int64_t n, int64_t j, int64_t width) {
      slopes(own.s, n, width, m.rate + i, m.shift + i, within(a) ? m.rate + j : nullptr,
             within(a) ? m.shift + j : nullptr);
      if (within(a)) {
        for (int64_t r = 0; i == j && r < n; r++) own.s[r * kTileStride<T> + r] = 0;
        add_to_rows(own.s, n, width, m.x, j, m.dx + i * ld);
        if (i != j) add_to_columns(own.s, n, width, m.x, i, m.dx + j * ld);
        return;
      }
      if (m.dx) add_to_rows(own.s, n, width, m.y, j, m.dx + i * ld);
      if (m.dy) add_to_columns(own.s, n, width, m.x, i, m.dy + j * ld);
    });
    each(team, max64(tiles.rows.count, tiles.columns.count), [&](int64_t t) {
      if (m.dx) finish(item, m.x, m.dx, tiles.rows.begin(t), tiles.rows.length(t), a.dx, own.row);
      if (m.dy) finish(item, m.y, m.dy, tiles.columns.begin(t), tiles.columns.length(t), a.dy, own.row);
    });
  }

 private:
  void slopes(T* s, int64_t n, int64_t width, const T* rate, const T* shift, const T* column_rate,
              const T* column_shift) const {
    const T factor = T(a.scale) * kLog2e<T>;
    for (int64_t r = 0; r < n; r++, s += kTileStride<T>)
      for (int64_t c = 0; c < width; c += kLanes<T>) {
        const Vec<T> t = load(s + c) * factor;
        Vec<T> w = exp2_nonpositive<T>(t - shift[r]) * rate[r];
        if (column_rate) w += exp2_nonpositive<T>(t - load(column_shift + c)) * load(column_rate + c);
        store(s + c, w);
      }
  }

  void finish(int64_t item, const PackedSet<T>& set, const T* dz, int64_t begin, int64_t n,
              const BatchView& out, T* row) const {
    const int64_t ld = round_up(a.D, kLanes<T>);
    const bool direct = is_native<T>(out.dtype);
    for (int64_t i = begin; i < begin + n; i++) {
      const int64_t offset = out.offset[item] + i * out.stride_n;
      T* dx = direct ? static_cast<T*>(out.data) + offset : row;
      set.finish(i, dz + i * ld, T(1), dx);
      if (!direct) store_row(dx, a.D, out.data, out.dtype, offset);
    }
  }
};

// The largest cosine of each row so far and where it is. NaN counts as infinity, which no cosine is: then the first NaN wins.
template <class T>
struct Nearest {
  const NearestForward& a;
  PairTiles<T> tiles;

  explicit Nearest(const NearestForward& args) : a(args), tiles(args) {}

  struct Item {
    PackedSet<T> x, y;
    T* best;
    Lane<T>* place;
    Item(Arena& arena, const Nearest& k)
        : x(arena, k.a.N, k.a.D, within(k.a), false),
          y(arena, within(k.a) ? 0 : k.a.M, k.a.D, true, false),
          best(arena.take<T>(round_up(k.a.N, kPanel<T>))),
          place(arena.take<Lane<T>>(round_up(k.a.N, kPanel<T>))) {}
  };
  struct Own {
    T* s;
    Own(Arena& arena, const Nearest&) : s(arena.take<T>(kTile * kTileStride<T>)) {}
  };

  void run(int64_t item, const Item& m, const Own& own, bool team) const {
    const T infinity = T(__builtin_inff());
    tiles.each_pack(team, item, m.x, m.y, [&](int64_t t) {
      const int64_t i = tiles.rows.begin(t);
      for (int64_t r = i; r < i + tiles.rows.length(t); r++) {
        m.best[r] = -infinity;
        m.place[r] = 0;
      }
    });
    tiles.each_tile(team, m.x, m.y, own.s, -infinity, [&](int64_t i, int64_t n, int64_t j, int64_t width) {
      if (within(a) && i != j)
        take<true>(own.s, n, width, i, j, m);
      else
        take<false>(own.s, n, width, i, j, m);
    });
    int64_t* nearest = a.nearest + item * a.N;
    each(team, tiles.rows.count, [&](int64_t t) {
      const int64_t i = tiles.rows.begin(t);
      for (int64_t r = i; r < i + tiles.rows.length(t); r++) nearest[r] = m.place[r];
    });
  }

 private:
  // The tile at (i, j), with Columns also as that at (j, i).
  template <bool Columns>
  static void take(const T* s, int64_t n, int64_t width, int64_t i, int64_t j, const Item& m) {
    constexpr int V = kLanes<T>;
    const T infinity = T(__builtin_inff());
    for (int64_t r = 0; r < n; r++, s += kTileStride<T>) {
      Vec<T> best = broadcast<T>(-infinity);
      Int<T> place = {};
      for (int64_t c = 0; c < width; c += V) {
        Vec<T> v = load(s + c);
        v = v == v ? v : broadcast<T>(infinity);
        if (c + V > width) v = first_lanes<T>(v, width - c, -infinity);
        const Int<T> better = v > best;  // not at equality: the earlier one stays
        best = better ? v : best;
        place = better ? lane_index<T>() + Lane<T>(j + c) : place;
        if constexpr (Columns) {
          const Vec<T> other = load(m.best + j + c);
          Int<T> at;
          memcpy(&at, m.place + j + c, sizeof at);
          const Int<T> row = Lane<T>(i + r) - Int<T>{};
          const Int<T> wins = (v > other) | ((v == other) & (row < at));
          store(m.best + j + c, wins ? v : other);
          at = wins ? row : at;
          memcpy(m.place + j + c, &at, sizeof at);
        }
      }
      for (int v = 0; v < V; v++)
        if (best[v] > m.best[i + r] || (best[v] == m.best[i + r] && place[v] < m.place[i + r])) {
          m.best[i + r] = best[v];
          m.place[i + r] = place[v];
        }
    }
  }
};

template <template <class> class Kernel, class Args>
bool dispatch(const Args& args) {
  return args.x.dtype == ScalarType::kDouble ? for_each_item(Kernel<double>(args), args.L, args.threads)
                                             : for_each_item(Kernel<float>(args), args.L, args.threads);
}

}  // namespace

bool pairwise_logsumexp_fwd(const LogSumExpForward& args) { return dispatch<LogSumExp>(args); }
bool pairwise_logsumexp_bwd(const LogSumExpBackward& args) {
  return (!args.dx.data && !args.dy.data) || dispatch<LogSumExpGradient>(args);
}
bool pairwise_nearest(const NearestForward& args) { return dispatch<Nearest>(args); }

}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
