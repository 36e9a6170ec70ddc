// Penalties on two Gram matrices of the same rows, forward and backward; the maths is in
// vitdiv_kernels/ops/pairs/two_gram/README.md.
//
// Tiles of S and T of the upper triangle stay in cache. Where a gradient is wanted the forward makes it from
// the same tiles, for dsums = 1: an item has one sum, so that the backward only has to multiply.
#include "pairs.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

// Penalties of vectors of S and T; their slopes take the place of s and t.
template <class T, GramPenalty P>
VITDIV_INLINE Vec<T> penalise(Vec<T>& s, Vec<T>& t, T margin) {
  const Vec<T> zero = {};
  if constexpr (P == GramPenalty::kProduct) {
    const Vec<T> p = s * t, slope = t;
    t = s;
    s = slope;
    return p;
  } else if constexpr (P == GramPenalty::kHinge) {
    const Vec<T> d = s - t, over = abs<T>(d) - margin;
    const Vec<T> sign = (d > zero ? broadcast<T>(1) : zero) - (d < zero ? broadcast<T>(1) : zero);
    s = over <= zero ? zero : sign;  // NaN is not <= 0
    t = -s;
    return over <= zero ? zero : over;
  } else {
    const Vec<T> positive = t <= zero ? zero : t;
    const Int<T> negative_s = s < zero, negative_t = t < zero;
    Vec<T> from = s, to = P == GramPenalty::kSquare ? t : positive;
    if constexpr (P == GramPenalty::kReluSquare) from = s <= zero ? zero : s;
    if constexpr (P == GramPenalty::kReluTeacherSquare) from = (negative_s & negative_t) ? zero : s;
    const Vec<T> d = from - to;
    const Vec<T> slope = d + d;
    if constexpr (P == GramPenalty::kReluSquare)
      s = s <= zero ? zero : slope;
    else if constexpr (P == GramPenalty::kReluTeacherSquare)
      s = (negative_s & negative_t) ? zero : slope;
    else
      s = slope;
    t = P != GramPenalty::kSquare ? (t <= zero ? zero : -slope) : -slope;
    return d * d;
  }
}

// The sum of the penalties of a tile [n, width]; its slopes take the place of s and t.
template <class T, GramPenalty P>
double penalise_tile(int64_t n, int64_t width, T margin, T* s, T* t) {
  constexpr int V = kLanes<T>;
  double total = 0;
  for (int64_t r = 0; r < n; r++, s += kTileStride<T>, t += kTileStride<T>) {
    Vec<T> row = {};
    for (int64_t c = 0; c < width; c += V) {
      Vec<T> sv = load(s + c), tv = load(t + c);
      const Vec<T> p = penalise<T, P>(sv, tv, margin);
      store(s + c, sv);
      store(t + c, tv);
      row += c + V <= width ? p : first_lanes<T>(p, width - c, T(0));
    }
    total += double(sum_lanes<T>(row));
  }
  return total;
}

template <class T>
double penalise_tile(GramPenalty penalty, int64_t n, int64_t width, T margin, T* s, T* t) {
  switch (penalty) {
    case GramPenalty::kSquare: return penalise_tile<T, GramPenalty::kSquare>(n, width, margin, s, t);
    case GramPenalty::kReluSquare: return penalise_tile<T, GramPenalty::kReluSquare>(n, width, margin, s, t);
    case GramPenalty::kReluTeacherSquare:
      return penalise_tile<T, GramPenalty::kReluTeacherSquare>(n, width, margin, s, t);
    case GramPenalty::kClampedTeacherSquare:
      return penalise_tile<T, GramPenalty::kClampedTeacherSquare>(n, width, margin, s, t);
    case GramPenalty::kHinge: return penalise_tile<T, GramPenalty::kHinge>(n, width, margin, s, t);
    default: return penalise_tile<T, GramPenalty::kProduct>(n, width, margin, s, t);
  }
}

template <class T>
struct TwoGram {
  const TwoGramForward& a;
  Tiling<T> tiling;

  explicit TwoGram(const TwoGramForward& args) : a(args), tiling(args.N) {}

  struct Item {
    PackedSet<T> x, y;
    T *dx, *dy;
    double* sums;  // of the tiles
    Item(Arena& arena, const TwoGram& k)
        : x(arena, k.a.N, k.a.D, true, k.a.needs_dx),
          y(arena, k.a.y.data ? k.a.N : 0, k.a.D2, true, k.a.needs_dy),
          dx(k.a.needs_dx ? arena.take<T>(k.a.N * round_up(k.a.D, kLanes<T>)) : nullptr),
          dy(k.a.needs_dy ? arena.take<T>(k.a.N * round_up(k.a.D2, kLanes<T>)) : nullptr),
          sums(arena.take<double>(k.tiling.count * k.tiling.count)) {}
  };
  struct Own {
    T *s, *t;
    Own(Arena& arena, const TwoGram&)
        : s(arena.take<T>(kTile * kTileStride<T>)), t(arena.take<T>(kTile * kTileStride<T>)) {}
  };

  void run(int64_t item, const Item& m, const Own& own, bool team) const {
    const int64_t tiles = tiling.count;
    each(team, tiles, [&](int64_t t) {
      const int64_t i = tiling.begin(t), n = tiling.length(t);
      m.x.pack({a.x, a.N}, item, i, n, a.normalise, T(a.eps));
      if (a.y.data) m.y.pack({a.y, a.N}, item, i, n, a.normalise, T(a.eps));
      clear(m.dx, m.x, i, n);
      clear(m.dy, m.y, i, n);
    });
    each_tile(team, UpperTiles(tiles),
              [&](int64_t row, int64_t column) { m.sums[row * tiles + column] = tile(m, own, row, column); });
    each(team, tiles, [&](int64_t t) {
      T* saved = static_cast<T*>(a.saved);
      finish(m.dx, m.x, t, saved + item * a.N * a.D);
      finish(m.dy, m.y, t, saved + (a.needs_dx ? a.L * a.N * a.D : 0) + item * a.N * a.D2);
      if (t > 0) return;
      double total = 0;
      for (int64_t row = 0; row < tiles; row++)
        for (int64_t column = row; column < tiles; column++)
          total += (row < column ? 2 : 1) * m.sums[row * tiles + column];
      static_cast<T*>(a.sums)[item] = T(total);
    });
  }

 private:
  static void clear(T* dx, const PackedSet<T>& x, int64_t i, int64_t n) {
    const int64_t ld = round_up(x.D, kLanes<T>);
    if (dx) memset(dx + i * ld, 0, size_t(n * ld) * sizeof(T));
  }

  double tile(const Item& m, const Own& own, int64_t row, int64_t column) const {
    const int64_t i = tiling.begin(row), n = tiling.length(row);
    const int64_t j = tiling.begin(column), width = tiling.length(column);
    products(m.x, i, n, j, width, own.s);
    if (a.y.data) {
      products(m.y, i, n, j, width, own.t);
    } else {
      memset(own.t, 0, size_t(n * kTileStride<T>) * sizeof(T));
      for (int64_t r = 0; row == column && r < n; r++) own.t[r * kTileStride<T> + r] = T(1);
    }
    const double sum = penalise_tile<T>(a.penalty, n, width, T(a.margin), own.s, own.t);
    add_slopes(own.s, m.x, m.dx, i, n, j, width);
    add_slopes(own.t, m.y, m.dy, i, n, j, width);
    return sum;
  }

  static void products(const PackedSet<T>& x, int64_t i, int64_t n, int64_t j, int64_t width, T* s) {
    if (i == j)
      diagonal_tile(x, i, n, s);
    else
      product_tile(x, i, n, x, j, width, s);
  }

  static void add_slopes(const T* w, const PackedSet<T>& x, T* dx, int64_t i, int64_t n, int64_t j,
                         int64_t width) {
    if (!dx) return;
    const int64_t ld = round_up(x.D, kLanes<T>);
    add_to_rows(w, n, width, x, j, dx + i * ld);
    if (i != j) add_to_columns(w, n, width, x, i, dx + j * ld);
  }

  // The slopes are symmetric: dz = 2 W z.
  void finish(const T* dz, const PackedSet<T>& x, int64_t t, T* out) const {
    const int64_t ld = round_up(x.D, kLanes<T>), begin = tiling.begin(t);
    if (!dz) return;
    for (int64_t i = begin; i < begin + tiling.length(t); i++) x.finish(i, dz + i * ld, T(2), out + i * x.D);
  }
};

template <class T>
bool backward(const TwoGramBackward& a) {
  const int64_t rows = a.L * a.N, width = max64(a.D, a.D2);
  const T* dsums = static_cast<const T*>(a.dsums);
  const T *saved_x = static_cast<const T*>(a.saved), *saved_y = saved_x + (a.dx.data ? rows * a.D : 0);
  Arena per_thread;
  per_thread.take<T>(width);
  const Block block(a.threads * per_thread.used());
  if (!block.data()) return false;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Arena arena(block.data() + thread_index() * per_thread.used());
    T* copy = arena.take<T>(width);
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      const int64_t item = row / a.N, i = row % a.N;
      if (a.dx.data) store_scaled(a.D, dsums[item], saved_x + row * a.D, a.dx, item, i, copy);
      if (a.dy.data) store_scaled(a.D2, dsums[item], saved_y + row * a.D2, a.dy, item, i, copy);
    }
  }
  return true;
}

}  // namespace

bool two_gram_fwd(const TwoGramForward& args) {
  return args.x.dtype == ScalarType::kDouble ? for_each_item(TwoGram<double>(args), args.L, args.threads)
                                             : for_each_item(TwoGram<float>(args), args.L, args.threads);
}

bool two_gram_bwd(const TwoGramBackward& args) {
  return args.x.dtype == ScalarType::kDouble ? backward<double>(args) : backward<float>(args);
}

}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
