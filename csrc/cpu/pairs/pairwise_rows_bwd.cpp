// The gradients of the log-sum-exp along rows of cosines; the maths is in
// vitdiv_kernels/ops/pairs/pairwise_rows/README.md.
//
// Within x they are made in the backward, from tiles of S made again. Of two sets they are made with the rows
// themselves: S is made once, and the backward only multiplies. What is kept fits any drows in dx, whose rows
// each have one, but in dy only drows that are equal within an item, as those of a mean are; for others dy is
// made as within x.
#include "pairwise_rows.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

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

// Rows and gradients in one, for two sets and drows = 1: a strip of S is made once, reduced, and multiplied
// with both sets.
template <class T>
struct LogSumExpWithGradients {
  static constexpr int64_t kStrip =
      96;  // rows: 64 and 192 were 6 % slower, with a thousand columns and 512 KB of L2
  static constexpr int64_t kChunk = 8;  // rows of a strip, or panels of dx, that make a task

  const LogSumExpForward& a;
  PairTiles<T> tiles;
  int64_t ld, strip_ld;  // of gradients, of a strip: an odd number of cache lines, as of a tile

  explicit LogSumExpWithGradients(const LogSumExpForward& args)
      : a(args),
        tiles(args),
        ld(round_up(args.D, kLanes<T>)),
        strip_ld(round_up(args.M, kPanel<T>) + 64 / int64_t(sizeof(T))) {}

  struct Item {
    PackedSet<T> x, y;
    T *s, *dx, *dy;
    Item(Arena& arena, const LogSumExpWithGradients& k)
        : x(arena, k.a.N, k.a.D, false, true),
          y(arena, k.a.M, k.a.D, true, true),
          s(arena.take<T>(kStrip * k.strip_ld)),
          dx(arena.take<T>(kStrip * k.ld)),
          dy(arena.take<T>(k.a.M * k.ld)) {}
  };
  struct Own {
    Own(Arena&, const LogSumExpWithGradients&) {}
  };

  void run(int64_t item, const Item& m, const Own&, bool team) const {
    tiles.each_pack(team, item, m.x, m.y, [&](int64_t t) {
      if (tiles.columns.length(t) > 0)
        memset(m.dy + tiles.columns.begin(t) * ld, 0, size_t(tiles.columns.length(t) * ld) * sizeof(T));
    });
    for (int64_t i = 0; i < a.N; i += kStrip) strip(item, m, i, min64(kStrip, a.N - i), team);
    T* saved_dy = static_cast<T*>(a.saved) + (a.L * a.N + item * a.M) * a.D;
    each(team, tiles.columns.count, [&](int64_t t) {
      const int64_t begin = tiles.columns.begin(t);
      for (int64_t j = begin; j < begin + tiles.columns.length(t); j++)
        m.y.finish(j, m.dy + j * ld, T(1), saved_dy + j * a.D);
    });
  }

 private:
  void strip(int64_t item, const Item& m, int64_t i, int64_t n, bool team) const {
    T* rows = static_cast<T*>(a.rows) + item * a.N + i;
    T* saved_dx = static_cast<T*>(a.saved) + (item * a.N + i) * a.D;
    each(team, tiles.columns.count, [&](int64_t t) {
      const int64_t j = tiles.columns.begin(t);
      product_tile(m.x, i, n, m.y, j, tiles.columns.length(t), m.s + j, strip_ld);
    });
    each(team, ceil_div(n, kChunk), [&](int64_t chunk) {
      for (int64_t r = chunk * kChunk; r < min64(n, (chunk + 1) * kChunk); r++)
        rows[r] = weigh(m.s + r * strip_ld);
    });
    const int64_t width = kChunk * kPanel<T>;
    each(team, tiles.columns.count + ceil_div(a.D, width), [&](int64_t task) {
      const int64_t j = tiles.columns.begin(task), d = (task - tiles.columns.count) * width;
      if (task < tiles.columns.count)
        gemm<T, true>(tiles.columns.length(task), a.D, n, m.s + j, strip_ld,
                      Panels<T>{m.x.panels + i * kPanel<T>, a.N}, m.dy + j * ld, ld, true);
      else
        for (int64_t k = 0; k < a.M; k += kDepth)
          gemm<T, false>(n, min64(width, a.D - d), min64(kDepth, a.M - k), m.s + k, strip_ld,
                         Panels<T>{m.y.panels + d * a.M + k * kPanel<T>, a.M}, m.dx + d, ld, k > 0);
    });
    each(team, ceil_div(n, kChunk), [&](int64_t chunk) {
      for (int64_t r = chunk * kChunk; r < min64(n, (chunk + 1) * kChunk); r++)
        m.x.finish(i + r, m.dx + r * ld, T(1), saved_dx + r * a.D);
    });
  }

  // s_j = scale exp(scale s_j - l); returns l, the log-sum-exp.
  T weigh(T* s) const {
    constexpr int V = kLanes<T>;
    const T infinity = T(__builtin_inff()), factor = T(a.scale) * kLog2e<T>;
    const auto at = [&](int64_t j, T fill) {
      return j + V <= a.M ? load(s + j) : first_lanes<T>(load(s + j), a.M - j, fill);
    };
    Vec<T> most = broadcast<T>(-infinity), total = {};
    for (int64_t j = 0; j < a.M; j += V) {
      const Vec<T> v = at(j, -infinity);
      most = v > most ? v : most;
    }
    T top = -infinity;
    for (int v = 0; v < V; v++) top = most[v] > top ? most[v] : top;
    for (int64_t j = 0; j < a.M; j += V) {
      const Vec<T> e = exp2_nonpositive<T>((at(j, -infinity) - top) * factor);
      total += e;
      store(s + j, e);
    }
    const T sum = sum_lanes<T>(total), weight = T(a.scale) / sum;
    for (int64_t j = 0; j < a.M; j += V) store(s + j, load(s + j) * weight);
    return T(a.scale) * top + log_of(sum);
  }
};

// The gradients that the forward kept, times drows: dx's rows have one each, dy's all of an item the same.
template <class T>
bool scale_saved(const LogSumExpBackward& a) {
  Arena per_thread;
  per_thread.take<T>(a.D);
  const Block block(a.threads * per_thread.used());
  if (!block.data()) return false;
  const T *drows = static_cast<const T*>(a.drows), *saved = static_cast<const T*>(a.saved);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Arena arena(block.data() + thread_index() * per_thread.used());
    T* copy = arena.take<T>(a.D);
    if (a.dx.data) {
#pragma omp for
      for (int64_t row = 0; row < a.L * a.N; row++)
        store_scaled(a.D, drows[row], saved + row * a.D, a.dx, row / a.N, row % a.N, copy);
    }
    if (a.dy.data) {
#pragma omp for
      for (int64_t row = 0; row < a.L * a.M; row++)
        store_scaled(a.D, drows[row / a.M * a.N], saved + (a.L * a.N + row) * a.D, a.dy, row / a.M, row % a.M,
                     copy);
    }
  }
  return true;
}

template <class T>
bool rows_of_an_item_are_equal(const LogSumExpBackward& a) {
  const T* drows = static_cast<const T*>(a.drows);
  for (int64_t row = 0; row < a.L * a.N; row++)
    if (drows[row] != drows[row / a.N * a.N]) return false;
  return true;
}

template <class T>
bool backward(LogSumExpBackward args) {
  if (args.saved && args.dy.data && !rows_of_an_item_are_equal<T>(args)) {
    LogSumExpBackward of_y = args;
    of_y.dx.data = nullptr;
    args.dy.data = nullptr;
    if (!for_each_item(LogSumExpGradient<T>(of_y), args.L, args.threads)) return false;
  }
  if (!args.dx.data && !args.dy.data) return true;
  return args.saved ? scale_saved<T>(args) : for_each_item(LogSumExpGradient<T>(args), args.L, args.threads);
}

}  // namespace

bool logsumexp_with_gradients(const LogSumExpForward& args) { return dispatch<LogSumExpWithGradients>(args); }

bool pairwise_logsumexp_bwd(const LogSumExpBackward& args) {
  return args.x.dtype == ScalarType::kDouble ? backward<double>(args) : backward<float>(args);
}

}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
