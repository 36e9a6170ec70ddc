// Log-sum-exp and largest cosine along the rows of all pairs of vectors; the maths is in
// vitdiv_kernels/ops/pairs/pairwise_rows/README.md.
#include "pairwise_rows.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

template <class T>
VITDIV_INLINE T exp2_of(T t) {
  return exp2_nonpositive<T>(broadcast(t))[0];
}

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

// The largest cosine of each row so far and where it is. NaN counts as infinity, which no cosine is: then the
// first NaN wins.
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

}  // namespace

bool pairwise_logsumexp_fwd(const LogSumExpForward& args) {
  return args.saved ? logsumexp_with_gradients(args) : dispatch<LogSumExp>(args);
}
bool pairwise_nearest(const NearestForward& args) { return dispatch<Nearest>(args); }

}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
