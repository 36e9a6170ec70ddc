// Penalties of pairwise cosine similarities, forward and backward; the maths is in
// vitdiv_kernels/ops/pairs/pairwise_cosine/README.md.
//
// signed and, where the width is the smaller side, square are closed forms. The rest walks tiles of
// similarities that stay in cache, the upper triangle only for pairs within x. abs and relu need of a
// similarity only its sign in the backward: the forward keeps one bit for "positive" and, for abs, one for
// "negative", [L, N, planes, ceil(M / 32)] words, so that the backward is one product and no tile is computed
// twice.
#include "../core/vectors.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

constexpr int64_t kWord = 32;

VITDIV_INLINE Set rows_set(const CosineArgs& a) { return {a.x, a.N}; }
VITDIV_INLINE Set columns_set(const CosineArgs& a) { return a.y.data ? Set{a.y, a.M} : Set{a.x, a.N}; }

bool closed_square(const CosineArgs& a) { return a.y.data ? (a.N + a.M) * a.D < a.N * a.M : a.D < a.N; }

// Unit rows i ... i + n as [n, D]. `row` holds one row.
template <class T>
void unit_rows(const Set& set, int64_t item, int64_t i, int64_t n, int64_t D, T eps, T* row, T* out) {
  for (int64_t r = 0; r < n; r++) {
    const Vector<T> x = vector_of(D, raw_rows(set, item, i + r, 1, D, row).data, eps, row);
    for (int64_t k = 0; k < D; k++) out[r * D + k] = x.data[k] * x.to_unit;
  }
}

// All unit rows as panels of D columns. `row` holds one row, `unit` one.
template <class T>
void pack_unit_rows(const Set& set, int64_t item, int64_t D, T eps, T* row, T* unit, T* panels) {
  for (int64_t i = 0; i < set.count; i++) {
    unit_rows(set, item, i, 1, D, eps, row, unit);
    pack_row(D, unit, i, set.count, panels);
  }
}

// Unit rows from `first` (a multiple of kPanel) on, transposed, as panels of one column a row. `staging`
// holds kPanel + 1 rows.
template <class T>
void pack_unit_columns(const Set& set, int64_t item, int64_t first, int64_t D, T eps, T* staging, T* panels) {
  for (int64_t j = first; j < set.count; j += kPanel<T>) {
    const int64_t width = min64(kPanel<T>, set.count - j);
    unit_rows(set, item, j, width, D, eps, staging + kPanel<T> * D, staging);
    pack_transposed(width, D, staging, D, panels + j * D);
  }
}

// X^T X [D, ld] of unit rows [n, D] as panels: the panels that hold a block's features are its left factor
// too.
template <class T>
void feature_gram(int64_t n, int64_t D, const T* panels, T* out, int64_t ld) {
  constexpr int64_t P = kPanel<T>;
  for (int64_t r = 0; r < D; r += P) {
    const int64_t rows = min64(P, D - r);
    for (int64_t j = r; j < D; j += P)
      gemm<T, true>(rows, min64(P, D - j), n, panels + r * n, P, Panels<T>{panels + j * n, n},
                    out + r * ld + j, ld, false);
  }
  mirror_upper(D, out, ld);
}

// Row ranges of an item's pieces, whole panels; for pairs within x of equal area of the upper triangle.
VITDIV_INLINE int64_t piece_begin(int64_t N, int64_t piece, int64_t pieces, bool triangle) {
  if (piece == pieces) return N;
  const double share = double(piece) / double(pieces);
  const double rows = double(N) * (triangle ? 1 - __builtin_sqrt(1 - share) : share);
  return min64(N, int64_t(rows / kWord + 0.5) * kWord);
}

VITDIV_INLINE int64_t sign_planes(Penalty p) { return p == Penalty::kAbs ? 2 : 1; }

struct Signs {
  uint32_t* words;
  int64_t planes, words_per_row;
  Signs(const CosineArgs& a, const void* saved, int64_t item)
      : planes(sign_planes(a.penalty)), words_per_row(ceil_div(a.M, kWord)) {
    words = saved ? static_cast<uint32_t*>(const_cast<void*>(saved)) + item * a.N * planes * words_per_row
                  : nullptr;
  }
  uint32_t* at(int64_t i, int64_t plane, int64_t j) const {
    return words + (i * planes + plane) * words_per_row + j / kWord;
  }
};

template <class T, Penalty P>
VITDIV_INLINE Vec<T> penalise(Vec<T> s) {
  if constexpr (P == Penalty::kAbs) return abs<T>(s);
  if constexpr (P == Penalty::kSquare) return s * s;
  return s < Vec<T>{} ? Vec<T>{} : s;
}

// The penalties of one micro-tile of raw products, c [rows, kPanel] at (i, j). `triangle`: only pairs j > i
// count.
template <class T, Penalty P>
double reduce_tile(const T* c, int64_t rows, int64_t i, int64_t j, const T* row_inverse_norms,
                   const T* column_inverse_norms, bool triangle, const Signs& signs) {
  Vec<T> total = {};
  for (int64_t r = 0; r < rows; r++) {
    Vec<T> row_total = {};
    uint32_t positive = 0, negative = 0;
    for (int v = 0; v < 2; v++) {
      Vec<T> s = load(c + r * kPanel<T> + v * kLanes<T>) * load(column_inverse_norms + v * kLanes<T>);
      if (triangle) {
        const Lane<T> first = Lane<T>(i + r + 1 - j - v * kLanes<T>);
        s = lane_index<T>() >= (first - Int<T>{}) ? s : Vec<T>{};
      }
      if (P == Penalty::kSquare)
        s *= row_inverse_norms[r];  // before squaring: the square of an inverse may overflow
      row_total += penalise<T, P>(s);
      if (signs.words) {
        positive |= positive_lanes<T>(s) << (v * kLanes<T>);
        if (P == Penalty::kAbs) negative |= positive_lanes<T>(-s) << (v * kLanes<T>);
      }
    }
    total += P == Penalty::kSquare ? row_total : row_total * row_inverse_norms[r];
    if (signs.words) {
      *signs.at(i + r, 0, j) |= positive << (j % kWord);
      if (P == Penalty::kAbs) *signs.at(i + r, 1, j) |= negative << (j % kWord);
    }
  }
  return double(sum_lanes<T>(total));
}

template <class T>
struct TileScratch {
  T *panels, *rows, *row_inverse_norms, *column_inverse_norms, *c;
  TileScratch(Arena& arena, const CosineArgs& a)
      : panels(arena.take<T>(packed_size<T>(a.M, a.D))),
        rows(arena.take<T>(kTile * a.D)),
        row_inverse_norms(arena.take<T>(kTile)),
        column_inverse_norms(arena.take<T>(round_up(a.M, kPanel<T>))),
        c(arena.take<T>(kMaxRows * kPanel<T>)) {}
};

// Columns from `first` (a multiple of kPanel) on: raw, or near 1, transposed, as panels; and what makes unit
// vectors of them, 0 in the padding. `copy` holds kPanel rows. Returns whether all are raw.
template <class T>
bool pack_columns(const Set& set, int64_t item, int64_t first, int64_t D, T eps, T* copy, T* panels,
                  T* inverse_norms) {
  bool all_raw = true;
  for (int64_t j = first; j < set.count; j += kPanel<T>) {
    const int64_t width = min64(kPanel<T>, set.count - j);
    Rows<T> x = raw_rows(set, item, j, width, D, copy);
    if (!find_inverse_norms(D, x, width, eps, inverse_norms + j)) {
      x = near_vectors(D, x, width, eps, copy, inverse_norms + j);
      all_raw = false;
    }
    for (int64_t c = width; c < kPanel<T>; c++) inverse_norms[j + c] = 0;
    pack_transposed(width, D, x.data, x.ld, panels + j * D);
  }
  return all_raw;
}

// Sum of the penalties of rows begin ... end of an item.
template <class T, Penalty P>
double tile_rows(const CosineForward& a, const TileScratch<T>& m, int64_t item, int64_t begin, int64_t end) {
  const Set rows_of_x = rows_set(a), columns = columns_set(a);
  const bool within = !a.y.data;
  const int64_t D = a.D;
  const Signs signs(a, a.saved, item);
  const bool raw_columns = pack_columns(columns, item, within ? begin / kPanel<T> * kPanel<T> : 0, D,
                                        T(a.eps), m.rows, m.panels, m.column_inverse_norms);
  constexpr int64_t kDepth = 384;  // of a product at a time: the rows' part stays in L1
  double total = 0;
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = min64(kTile, end - i);
    Rows<T> x = raw_rows(rows_of_x, item, i, n, D, m.rows);
    if (within) memcpy(m.row_inverse_norms, m.column_inverse_norms + i, size_t(n) * sizeof(T));
    if (within ? !raw_columns : !find_inverse_norms(D, x, n, T(a.eps), m.row_inverse_norms))
      x = near_vectors(D, x, n, T(a.eps), m.rows, m.row_inverse_norms);
    for (int64_t r = 0; within && a.include_self && r < n; r++) {
      const T unit =
          m.row_inverse_norms[r] * m.row_inverse_norms[r] * dot(D, x.data + r * x.ld, x.data + r * x.ld);
      total += double(P == Penalty::kSquare ? unit * unit : unit);
    }
    const RowBlocks blocks(n);
    for (int64_t j = within ? i / kPanel<T> * kPanel<T> : 0; j < columns.count; j += kPanel<T>)
      for (int64_t block = 0; block < blocks.count; block++) {
        const int64_t r = blocks.begin(block), rows = blocks.size(block);
        if (within && j + kPanel<T> <= i + r + 1)
          break;  // this block and those below it lie under the diagonal
        for (int64_t k = 0; k < D; k += kDepth)
          micro_kernel_rows<T, 2, false>(rows, min64(kDepth, D - k), x.data + r * x.ld + k, x.ld,
                                         m.panels + j * D + k * kPanel<T>, m.c, kPanel<T>, k > 0);
        const bool triangle = within && j <= i + r + rows - 1;
        const double sum = reduce_tile<T, P>(m.c, rows, i + r, j, m.row_inverse_norms + r,
                                             m.column_inverse_norms + j, triangle, signs);
        total += within ? 2 * sum : sum;
      }
  }
  return total;
}

template <class T>
bool tiles_forward(const CosineForward& a) {
  const int64_t pieces = pieces_per_item(a.L, a.threads, min64(ceil_div(a.N, kTile), a.threads)),
                tasks = a.L * pieces;
  Arena per_thread;
  TileScratch<T>(per_thread, a);
  const int64_t sums_bytes = round_up(tasks * int64_t(sizeof(double)), 64);
  const Block block(sums_bytes + a.threads * per_thread.used());
  if (!block.data()) return false;
  double* sums = reinterpret_cast<double*>(block.data());
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Arena arena(block.data() + sums_bytes + thread_index() * per_thread.used());
    const TileScratch<T> m(arena, a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t item = task / pieces, piece = task % pieces;
      const int64_t begin = piece_begin(a.N, piece, pieces, !a.y.data);
      const int64_t end = piece_begin(a.N, piece + 1, pieces, !a.y.data);
      sums[task] = a.penalty == Penalty::kAbs      ? tile_rows<T, Penalty::kAbs>(a, m, item, begin, end)
                   : a.penalty == Penalty::kSquare ? tile_rows<T, Penalty::kSquare>(a, m, item, begin, end)
                                                   : tile_rows<T, Penalty::kRelu>(a, m, item, begin, end);
    }
  }
  for (int64_t item = 0; item < a.L; item++) {
    double total = 0;
    for (int64_t piece = 0; piece < pieces; piece++) total += sums[item * pieces + piece];
    static_cast<T*>(a.sums)[item] = T(total);
  }
  return true;
}

// The sum of a set's unit rows; returns the sum of their squared norms.
template <class T>
double sum_unit_rows(const Set& set, int64_t item, int64_t D, T eps, T* row, double* sums, T* out) {
  for (int64_t k = 0; k < D; k++) sums[k] = 0;
  double squares = 0;
  for (int64_t i = 0; i < set.count; i++) {
    const Vector<T> x = vector_of(D, raw_rows(set, item, i, 1, D, row).data, eps, row);
    for (int64_t k = 0; k < D; k++) sums[k] += double(x.data[k] * x.to_unit);
    squares += double(x.length) * double(x.length);
  }
  for (int64_t k = 0; k < D; k++) out[k] = T(sums[k]);
  return squares;
}

// |sum of unit rows|^2 (less the pairs of a row with itself), or the product of two sets' sums.
template <class T>
bool signed_forward(const CosineForward& a) {
  Arena per_thread;
  per_thread.take<double>(2 * a.D);
  per_thread.take<T>(a.D);
  const Block block(a.threads * per_thread.used());
  if (!block.data()) return false;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Arena arena(block.data() + thread_index() * per_thread.used());
    double *sx = arena.take<double>(2 * a.D), *sy = sx + a.D;
    T* row = arena.take<T>(a.D);
    T* saved = static_cast<T*>(a.saved);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < a.L; item++) {
      const double squares = sum_unit_rows(rows_set(a), item, a.D, T(a.eps), row, sx, saved + item * a.D);
      if (a.y.data) sum_unit_rows(columns_set(a), item, a.D, T(a.eps), row, sy, saved + (a.L + item) * a.D);
      const double* other = a.y.data ? sy : sx;
      double total = 0;
      for (int64_t k = 0; k < a.D; k++) total += sx[k] * other[k];
      static_cast<T*>(a.sums)[item] = T(a.y.data || a.include_self ? total : total - squares);
    }
  }
  return true;
}

// Scratch for the closed form of square: unit rows of one set as panels and the Gram matrix of the features
// of each.
template <class T>
struct SquareScratch {
  int64_t ld;
  T *row, *unit, *panels, *gram_x, *gram_y;
  SquareScratch(Arena& arena, const CosineArgs& a)
      : ld(round_up(a.D, kLanes<T>)),
        row(arena.take<T>(a.D)),
        unit(arena.take<T>(a.D)),
        panels(arena.take<T>(packed_size<T>(a.D, max64(a.N, a.M)))),
        gram_x(arena.take<T>(a.D * ld)),
        gram_y(arena.take<T>(a.y.data ? a.D * ld : 0)) {}
  void make_gram(const Set& set, int64_t item, const CosineArgs& a, T* gram) const {
    pack_unit_rows(set, item, a.D, T(a.eps), row, unit, panels);
    feature_gram(set.count, a.D, panels, gram, ld);
  }
};

// sum_ij (x_i . y_j)^2 = <X^T X, Y^T Y>
template <class T>
bool square_forward(const CosineForward& a) {
  Arena per_thread;
  SquareScratch<T>(per_thread, a);
  const Block block(a.threads * per_thread.used());
  if (!block.data()) return false;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Arena arena(block.data() + thread_index() * per_thread.used());
    const SquareScratch<T> m(arena, a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < a.L; item++) {
      m.make_gram(rows_set(a), item, a, m.gram_x);
      double total = 0;
      for (int64_t i = 0; !a.y.data && !a.include_self && i < a.N; i++) {
        unit_rows(rows_set(a), item, i, 1, a.D, T(a.eps), m.row, m.unit);
        const double square = double(dot(a.D, m.unit, m.unit));
        total -= square * square;
      }
      if (a.y.data) m.make_gram(columns_set(a), item, a, m.gram_y);
      const T* other = a.y.data ? m.gram_y : m.gram_x;
      for (int64_t r = 0; r < a.D; r++) total += double(dot(a.D, m.gram_x + r * m.ld, other + r * m.ld));
      static_cast<T*>(a.sums)[item] = T(total);
    }
  }
  return true;
}

template <class T>
bool forward(const CosineForward& a) {
  if (a.penalty == Penalty::kSigned) return signed_forward<T>(a);
  if (a.penalty == Penalty::kSquare && closed_square(a)) return square_forward<T>(a);
  return tiles_forward<T>(a);
}

// The gradient of one set's rows against the unit rows of the other, or of x against itself.
template <class T>
struct RowsGradient {
  const CosineBackward& a;
  Set rows, columns;
  BatchView out;
  bool within, of_y;
  RowsGradient(const CosineBackward& args, bool y)
      : a(args),
        rows(y ? columns_set(args) : rows_set(args)),
        columns(y ? rows_set(args) : columns_set(args)),
        out(y ? args.dy : args.dx),
        within(!args.y.data),
        of_y(y) {}
  bool squares() const { return a.penalty == Penalty::kSquare; }
  bool tiles() const { return a.penalty != Penalty::kSigned && !(squares() && closed_square(a)); }
  bool closed() const { return squares() && closed_square(a); }
  bool run() const;

 private:
  struct Scratch {
    int64_t ld;
    T *z, *columns_t, *staging, *gram, *gram_panels, *w, *zi, *dz, *row, *unit;
    Scratch(Arena& arena, const RowsGradient& g)
        : ld(round_up(g.a.D, kLanes<T>)),
          z(arena.take<T>(g.tiles() || g.closed() ? packed_size<T>(g.a.D, g.columns.count) : 0)),
          columns_t(arena.take<T>(g.squares() && g.tiles() ? packed_size<T>(g.columns.count, g.a.D) : 0)),
          staging(arena.take<T>((kPanel<T> + 1) * g.a.D)),
          gram(arena.take<T>(g.closed() ? g.a.D * ld : 0)),
          gram_panels(arena.take<T>(g.closed() ? packed_size<T>(g.a.D, g.a.D) : 0)),
          w(arena.take<T>(kTile * kTileStride<T>)),
          zi(arena.take<T>(kTile * g.a.D)),
          dz(arena.take<T>(kTile * ld)),
          row(arena.take<T>(g.a.D)),
          unit(arena.take<T>(g.a.D)) {}
  };
  void prepare(const Scratch& m, int64_t item) const;
  void add_signs(const Scratch& m, int64_t item, int64_t i, int64_t n, int64_t j, int64_t width) const;
  void add_similarities(const Scratch& m, int64_t i, int64_t n, int64_t j, int64_t width) const;
  void unit_gradient(const Scratch& m, int64_t item, int64_t i, int64_t n) const;
  void finish(const Scratch& m, int64_t item, int64_t i, int64_t n) const;
};

template <class T>
void RowsGradient<T>::prepare(const Scratch& m, int64_t item) const {
  if (!tiles() && !closed()) return;
  pack_unit_rows(columns, item, a.D, T(a.eps), m.row, m.unit, m.z);
  if (closed()) {
    feature_gram(columns.count, a.D, m.z, m.gram, m.ld);
    pack_rows(a.D, a.D, m.gram, m.ld, m.gram_panels);
  } else if (squares()) {
    pack_unit_columns(columns, item, 0, a.D, T(a.eps), m.staging, m.columns_t);
  }
}

// Signs of columns j ... j + width of row i as +1, -1, 0; only of pairs j > i with `triangle`.
template <class T>
void expand_signs(const Signs& signs, int64_t i, int64_t j, int64_t width, bool triangle, T* out) {
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    uint32_t bits[2] = {0, 0};
    for (int64_t plane = 0; plane < signs.planes && (j + c) / kWord < signs.words_per_row; plane++) {
      bits[plane] = *signs.at(i, plane, j + c) >> ((j + c) % kWord);
      const int64_t below = i + 1 - (j + c);  // the lanes of pairs j <= i
      if (triangle && below > 0) bits[plane] = below < kWord ? bits[plane] >> below << below : 0;
    }
    store(out + c, lanes_from_bits<T>(bits[0], T(1)) + lanes_from_bits<T>(bits[1], T(-1)));
  }
}

template <class T>
void RowsGradient<T>::add_signs(const Scratch& m, int64_t item, int64_t i, int64_t n, int64_t j,
                                int64_t width) const {
  constexpr int64_t S = kTileStride<T>;
  const Signs signs(a, a.saved, item);
  const Panels<T> z = {m.z + j * kPanel<T>, columns.count};
  if (of_y || (within && j < i)) {  // the words stand in the other set's rows
    for (int64_t c = 0; c < width; c++) expand_signs(signs, j + c, i, n, false, m.w + c * S);
    gemm<T, true>(n, a.D, width, m.w, S, z, m.dz, m.ld, true);
    return;
  }
  const bool diagonal = within && i == j;
  for (int64_t r = 0; r < n; r++) expand_signs(signs, i + r, j, width, diagonal, m.w + r * S);
  if (diagonal) mirror_upper(n, m.w, S);
  for (int64_t r = 0; diagonal && r < n; r++) {
    const T* x = raw_rows(rows, item, i + r, 1, a.D, m.row).data;
    m.w[r * S + r] = a.include_self && vector_of(a.D, x, T(a.eps), m.row).length > 0 ? T(1) : T(0);
  }
  gemm<T, false>(n, a.D, width, m.w, S, z, m.dz, m.ld, true);
}

template <class T>
void RowsGradient<T>::add_similarities(const Scratch& m, int64_t i, int64_t n, int64_t j,
                                       int64_t width) const {
  constexpr int64_t S = kTileStride<T>;
  gemm<T, false>(n, width, a.D, m.zi, a.D, Panels<T>{m.columns_t + j * a.D, a.D}, m.w, S, false);
  for (int64_t r = 0; r < n; r++)
    for (int64_t c = 0; c < width; c++)
      m.w[r * S + c] *= within && !a.include_self && i + r == j + c ? T(0) : T(2);
  gemm<T, false>(n, a.D, width, m.w, S, Panels<T>{m.z + j * kPanel<T>, columns.count}, m.dz, m.ld, true);
}

// m.dz: the gradient of unit rows i ... i + n of the sum, counting a pair within x once.
template <class T>
void RowsGradient<T>::unit_gradient(const Scratch& m, int64_t item, int64_t i, int64_t n) const {
  if (squares()) unit_rows(rows, item, i, n, a.D, T(a.eps), m.row, m.zi);
  if (closed()) {
    gemm<T, false>(n, a.D, a.D, m.zi, a.D, Panels<T>{m.gram_panels, a.D}, m.dz, m.ld, false);
    for (int64_t r = 0; r < n; r++) {
      const T *zi = m.zi + r * a.D, self = within && !a.include_self ? dot(a.D, zi, zi) : T(0);
      for (int64_t k = 0; k < a.D; k++) m.dz[r * m.ld + k] = 2 * (m.dz[r * m.ld + k] - self * zi[k]);
    }
    return;
  }
  if (!tiles()) {
    const T* sums = static_cast<const T*>(a.saved) + (within || of_y ? item : a.L + item) * a.D;
    for (int64_t r = 0; r < n; r++) {
      T* dz = m.dz + r * m.ld;
      if (within && !a.include_self) {
        unit_rows(rows, item, i + r, 1, a.D, T(a.eps), m.row, dz);
        for (int64_t k = 0; k < a.D; k++) dz[k] = sums[k] - dz[k];
      } else {
        memcpy(dz, sums, size_t(a.D) * sizeof(T));
      }
    }
    return;
  }
  memset(m.dz, 0, size_t(n * m.ld) * sizeof(T));
  for (int64_t j = 0; j < columns.count; j += kTile) {
    const int64_t width = min64(kTile, columns.count - j);
    if (squares())
      add_similarities(m, i, n, j, width);
    else
      add_signs(m, item, i, n, j, width);
  }
}

// Through the normalisation: dx = (dz - z (z . dz)) / |x|, or dz / eps for |x| <= eps.
template <class T>
void RowsGradient<T>::finish(const Scratch& m, int64_t item, int64_t i, int64_t n) const {
  const T factor = static_cast<const T*>(a.dsums)[item] * (within ? T(2) : T(1));
  for (int64_t r = 0; r < n; r++) {
    const Vector<T> x = vector_of(a.D, raw_rows(rows, item, i + r, 1, a.D, m.row).data, T(a.eps), m.row);
    const T* dz = m.dz + r * m.ld;
    const T along = x.radial ? dot(a.D, x.data, dz) * x.to_unit * x.to_unit : T(0);
    const bool direct = is_native<T>(out.dtype);
    const int64_t offset = out.offset[item] + (i + r) * out.stride_n;
    T* dx = direct ? static_cast<T*>(out.data) + offset : m.unit;
    for (int64_t k = 0; k < a.D; k++) dx[k] = factor * x.inverse_norm * (dz[k] - x.data[k] * along);
    if (!direct) store_row(dx, a.D, out.data, out.dtype, offset);
  }
}

template <class T>
bool RowsGradient<T>::run() const {
  const int64_t row_tiles = ceil_div(rows.count, kTile);
  const int64_t pieces = pieces_per_item(a.L, a.threads, min64(row_tiles, a.threads)), tasks = a.L * pieces;
  Arena per_thread;
  Scratch(per_thread, *this);
  const Block block(a.threads * per_thread.used());
  if (!block.data()) return false;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Arena arena(block.data() + thread_index() * per_thread.used());
    const Scratch m(arena, *this);
    int64_t prepared = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t item = task / pieces, piece = task % pieces;
      if (item != prepared) prepare(m, prepared = item);
      for (int64_t t = piece * row_tiles / pieces; t < (piece + 1) * row_tiles / pieces; t++) {
        const int64_t i = t * kTile, n = min64(kTile, rows.count - i);
        unit_gradient(m, item, i, n);
        finish(m, item, i, n);
      }
    }
  }
  return true;
}

template <class T>
bool backward(const CosineBackward& a) {
  return (!a.dx.data || RowsGradient<T>(a, false).run()) && (!a.dy.data || RowsGradient<T>(a, true).run());
}

}  // namespace

bool pairwise_cosine_fwd(const CosineForward& args) {
  return args.x.dtype == ScalarType::kDouble ? forward<double>(args) : forward<float>(args);
}

bool pairwise_cosine_bwd(const CosineBackward& args) {
  return args.x.dtype == ScalarType::kDouble ? backward<double>(args) : backward<float>(args);
}

}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
