// Forward of pairwise cosine penalties; the maths is in vitdiv_kernels/ops/pairwise_cosine/README.md.
//
// One kernel reads each vector for its inverse norm. The tile kernel multiplies raw vectors, applies the inverse norms to
// the products and sums the penalties along rows and along columns of the tile; of pairs within x it makes the upper
// triangle only and counts it both ways. Each tile has a slot of its own for its sums; they are added in order.
#include <algorithm>

#include "pairwise_cosine.cuh"

namespace vitdiv::cuda {
namespace {

constexpr const char* kName = "pairwise_cosine_fwd";
constexpr int kThreads = 256;   // of the kernels without tiles
constexpr int kBlockRows = 32;  // vectors that a block of them reads, four a warp
constexpr int kSumRows = 256;   // vectors whose sums a block adds

template <class T>
struct RatesKernel {
  Vectors<T> x;
  int blocks;  // of an item
  Acc<T> eps, inverse_eps;
  Global<Acc<T>> rates;  // [items, count]
  bool signed_sums;
  Global<Acc<T>> sums, squares;  // [items, blocks, width], [items, blocks]: of unit vectors
};

// 1 / max(|x|, eps) of each vector; for `signed` also the sum of a block's unit vectors and of their squared norms.
template <class T>
KERNEL LAUNCH_BOUNDS(kThreads, 2) vector_rates(RatesKernel<T> a) {
  constexpr int each = kBlockRows / (kThreads / 32);
  const int warp = thread_x() >> 5, lane = lane_id();
  const int64_t item = block_x() / a.blocks, x = item * a.x.item;
  const int row0 = block_x() % a.blocks * kBlockRows, mine = row0 + warp * each;
  Acc<T> squares[each] = {};
  if (a.x.pieces) {
    for (int k = lane * kPiece<T>; k < a.x.width; k += 32 * kPiece<T>)
      UNROLLED_FOR (int r = 0; r < each; ++r) {
        if (mine + r >= a.x.count) continue;
        Acc<T> v[kPiece<T>];
        unpack<T>(a.x.data.template ld<uint4>(x + (mine + r) * a.x.row + k), v);
        UNROLLED_FOR (int i = 0; i < kPiece<T>; ++i) squares[r] += v[i] * v[i];
      }
  } else {
    for (int k = lane; k < a.x.width; k += 32)
      UNROLLED_FOR (int r = 0; r < each; ++r) {
        if (mine + r >= a.x.count) continue;
        const Acc<T> v = to_float(a.x.data.ld(x + (mine + r) * a.x.row + k));
        squares[r] += v * v;
      }
  }
  Carver carve;
  const Shared<Acc<T>> rates = carve.take<Acc<T>>(kBlockRows), lengths = carve.take<Acc<T>>(kBlockRows);
  UNROLLED_FOR (int r = 0; r < each; ++r) {
    const Acc<T> norm = square_root(warp_sum(squares[r]));
    const Acc<T> rate = norm <= a.eps ? a.inverse_eps : 1 / norm;  // of a NaN a NaN
    if (lane != 0) continue;
    if (mine + r < a.x.count) a.rates.st(item * a.x.count + mine + r, rate);
    rates.st(warp * each + r, rate);
    lengths.st(warp * each + r, norm * rate);
  }
  if (!a.signed_sums) return;
  sync_block();
  const int present = a.x.count - row0 < kBlockRows ? a.x.count - row0 : kBlockRows;
  for (int k = thread_x(); k < a.x.width; k += threads()) {
    Acc<T> sum = 0;
    for (int r = 0; r < present; ++r)
      sum += to_float(a.x.data.ld(x + (row0 + r) * a.x.row + k)) * rates.ld(r);
    a.sums.st(int64_t(block_x()) * a.x.width + k, sum);
  }
  if (thread_x() == 0) {
    Acc<T> sum = 0;
    for (int r = 0; r < present; ++r) sum += lengths.ld(r) * lengths.ld(r);
    a.squares.st(block_x(), sum);
  }
}

template <class T>
struct SimilarityKernel {
  Vectors<T> x, y;
  Global<const Acc<T>> x_rates, y_rates;
  Global<Acc<T>> x_sums, y_sums;  // [items, column tiles, N], [items, row tiles, M]
  Global<uint32_t> signs;
  int row_tiles, column_tiles, tiles, stages;  // tiles: of an item
  bool within, include_self, column_sums, keep_signs;
  Penalty penalty;
};

template <class A>
DEVICE A penalise(Penalty penalty, A s) {
  if (penalty == Penalty::kSquare) return s * s;
  return s < 0 ? (penalty == Penalty::kAbs ? -s : A(0)) : s;  // a NaN stays
}

template <class T>
KERNEL LAUNCH_BOUNDS(CosineTile<T>::kThreads, sizeof(T) == 2 ? 2 : 1) similarity_tile(SimilarityKernel<T> a) {
  using Tile = CosineTile<T>;
  using A = Acc<T>;
  const int lane = lane_id(), n = a.x.count, m = a.y.count;
  int row_tile = 0, column_tile = block_x() % a.tiles;
  if (a.within) {
    for (; column_tile >= a.row_tiles - row_tile; ++row_tile) column_tile -= a.row_tiles - row_tile;
    column_tile += row_tile;
  } else {
    row_tile = column_tile / a.column_tiles;
    column_tile %= a.column_tiles;
  }
  const int64_t item = block_x() / a.tiles;
  const int row0 = row_tile * Tile::kSize, column0 = column_tile * Tile::kSize;
  const bool diagonal = a.within && row_tile == column_tile;
  Carver carve;
  const CosineProducts<T> products{carve.take<T>(a.stages * Tile::kStage), a.stages};
  const Shared<A> row_sums = carve.take<A>(2 * Tile::kSize),
                  column_sums = carve.take<A>(Tile::kDown * Tile::kSize);

  const CosinePart<T> part(row0, column0, n, m, a.within);
  typename Tile::Sums acc = {};
  products.add(acc, part, a.x, item * a.x.item, row0, a.y, item * a.y.item, column0, diagonal);

  const int row = row0 + part.row, words = (m + 31) / 32, planes = a.penalty == Penalty::kAbs ? 2 : 1;
  A rate[2][2], sum[2][2] = {};
  UNROLLED_FOR (int r = 0; r < 2; ++r)
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const int at = row + 16 * r + tile_row(2 * i);
      rate[r][i] = at < n ? a.x_rates.ld(item * n + at) : A(0);
    }
  UNROLLED_FOR (int g = 0; g < Tile::kGroups; ++g) {
    const bool active = g >= part.first && g < part.end;
    const int column = column0 + part.column + 32 * g;
    const bool mirrored = active && (a.within ? column > row : a.column_sums);
    uint32_t positive[2][2] = {}, negative[2][2] = {};
    UNROLLED_FOR (int h = 0; h < 2; ++h)
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        UNROLLED_FOR (int e = 0; e < 2; ++e) {
          const int bit = 16 * h + 8 * j + tile_col(e), to = column + bit;
          const A column_rate = to < m ? a.y_rates.ld(item * m + to) : A(0);
          A column_sum = 0;
          UNROLLED_FOR (int r = 0; r < 2; ++r)
            UNROLLED_FOR (int i = 0; i < 2; ++i) {
              const int from = row + 16 * r + tile_row(2 * i);
              const bool counts = from < n && to < m && (!a.within || a.include_self || from != to);
              const A s = counts ? acc[g][h][r][j][2 * i + e] * rate[r][i] * column_rate : A(0);
              const A penalty = penalise(a.penalty, s);
              sum[r][i] += penalty;
              column_sum += penalty;
              positive[r][i] |= uint32_t(s > 0) << bit;
              negative[r][i] |= uint32_t(s < 0) << bit;
            }
          if (mirrored)
            UNROLLED_FOR (int mask = 4; mask < 32; mask *= 2)
              column_sum += warp_shuffle_xor(column_sum, mask);
          if (a.column_sums && lane < 4)
            column_sums.st(part.row / 32 * Tile::kSize + to - column0, mirrored ? column_sum : A(0));
        }
    if (!a.keep_signs || !active) continue;
    UNROLLED_FOR (int r = 0; r < 2; ++r)
      UNROLLED_FOR (int i = 0; i < 2; ++i) {
        const int from = row + 16 * r + tile_row(2 * i);
        const int64_t to = (item * n + from) * planes * words + column / 32;
        UNROLLED_FOR (int plane = 0; plane < 2; ++plane) {
          uint32_t& bits = plane ? negative[r][i] : positive[r][i];
          bits |= warp_shuffle_xor(bits, 1);
          bits |= warp_shuffle_xor(bits, 2);
          if ((lane & 3) == 0 && from < n && plane < planes) a.signs.st(to + plane * words, bits);
        }
      }
  }
  UNROLLED_FOR (int r = 0; r < 2; ++r)
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      sum[r][i] = quad_sum(sum[r][i]);
      if ((lane & 3) == 0)
        row_sums.st((part.column > 0 ? Tile::kSize : 0) + part.row + 16 * r + tile_row(2 * i), sum[r][i]);
    }
  sync_block();
  for (int c = thread_x(); c < Tile::kSize; c += threads()) {
    A sum_of_row = row_sums.ld(c) + row_sums.ld(Tile::kSize + c), sum_of_column = 0;
    if (a.column_sums)
      for (int w = 0; w < Tile::kDown; ++w) sum_of_column += column_sums.ld(w * Tile::kSize + c);
    if (diagonal) sum_of_row += sum_of_column;
    if (row0 + c < n) a.x_sums.st((item * a.column_tiles + column_tile) * n + row0 + c, sum_of_row);
    if (a.column_sums && !diagonal && column0 + c < m)
      a.y_sums.st((item * a.row_tiles + row_tile) * m + column0 + c, sum_of_column);
  }
}

// For each vector the sum of its penalties over the tiles, if it is kept, and the sum over a block's vectors.
template <class A>
KERNEL LAUNCH_BOUNDS(kSumRows, 1) sum_tiles(Global<const A> parts, Global<A> sums, Global<A> totals, int n,
                                            int tiles, int blocks, bool keep_sums, bool keep_totals) {
  Carver carve;
  const Shared<double> memory = carve.take<double>(kSumRows / 32);
  const int64_t item = block_x() / blocks;
  const int i = block_x() % blocks * kSumRows + thread_x();
  double sum = 0;
  if (i < n) {
    for (int t = 0; t < tiles; ++t) sum += parts.ld((item * tiles + t) * n + i);
    if (keep_sums) sums.st(item * n + i, static_cast<A>(sum));
  }
  if (!keep_totals) return;
  const double total = block_sum(sum, memory);
  if (thread_x() == 0) totals.st(block_x(), static_cast<A>(total));
}

// x . y of the sums of unit vectors of two sets or of one, less the pairs of each vector with itself.
template <class A>
KERNEL LAUNCH_BOUNDS(kThreads, 1) signed_totals(Global<const A> x, Global<const A> y, Global<const A> squares,
                                                Global<A> totals, int width, int blocks) {
  Carver carve;
  const Shared<double> memory = carve.take<double>(kThreads / 32);
  const int64_t item = block_x();
  double sum = 0;
  for (int k = thread_x(); k < width; k += threads())
    sum += static_cast<double>(x.ld(item * width + k)) * y.ld(item * width + k);
  for (int b = thread_x(); b < blocks; b += threads()) sum -= squares.ld(item * blocks + b);
  sum = block_sum(sum, memory);
  if (thread_x() == 0) totals.st(item, static_cast<A>(sum));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Places in scratch, in bytes.
template <class T>
struct Places {
  int64_t rates[2], sums[2], parts[2], squares[2], totals, size = 0;
  explicit Places(const CosineForward& args) {
    const int64_t counts[2] = {args.N, args.M}, tile = CosineTile<T>::kSize, L = args.L;
    const bool is_signed = args.penalty == Penalty::kSigned;
    const auto take = [&](int64_t numbers) {
      const int64_t at = size;
      size += ceil_div(numbers * int64_t(sizeof(Acc<T>)), 256) * 256;
      return at;
    };
    for (int s = 0; s < (args.y.data ? 2 : 1); ++s) {
      const int64_t blocks = ceil_div(counts[s], kBlockRows);
      rates[s] = take(args.saved ? 0 : L * counts[s]);
      sums[s] = take(args.saved || !is_signed ? 0 : L * args.D);
      squares[s] = take(is_signed ? L * blocks : 0);
      parts[s] = take(L * (is_signed ? blocks * args.D : ceil_div(counts[1 - s], tile) * counts[s]));
    }
    totals = take(L * ceil_div(args.N, kSumRows));
  }
};

template <class T>
void forward(const CosineForward& args, void* scratch, void* stream) {
  using A = Acc<T>;
  using Tile = CosineTile<T>;
  const Places<T> at(args);
  const CosineSaved saved(args);
  const bool within = !args.y.data, is_signed = args.penalty == Penalty::kSigned;
  const int sets = within ? 1 : 2;
  const Vectors<T> v[2] = {rows_of<T>(args), columns_of<T>(args)};
  const auto place = [&](int64_t bytes) { return reinterpret_cast<A*>(static_cast<char*>(scratch) + bytes); };
  const auto keep = [&](int64_t word, int64_t bytes) {
    return args.saved ? in_words<A>(args.saved, word) : place(bytes);
  };
  A *rates[2], *sums[2], *squares[2];
  for (int s = 0; s < sets; ++s) {
    const int blocks = static_cast<int>(ceil_div(v[s].count, kBlockRows));
    rates[s] = keep(saved.rates[s], at.rates[s]);
    sums[s] = is_signed || args.saved ? keep(saved.sums[s], at.sums[s]) : nullptr;
    squares[s] = place(at.squares[s]);
    A* parts = blocks > 1 ? place(at.parts[s]) : sums[s];
    launch(kName, vector_rates<T>, args.L * blocks, kThreads, 2 * kBlockRows * sizeof(A), stream,
           RatesKernel<T>{v[s],
                          blocks,
                          static_cast<A>(args.eps),
                          static_cast<A>(inverse_of(args.eps)),
                          {rates[s]},
                          is_signed,
                          {parts},
                          {squares[s]}});
    if (is_signed && blocks > 1) launch_sum_parts(kName, parts, sums[s], args.L, blocks, int(args.D), stream);
  }
  const int other = within ? 0 : 1;
  if (is_signed) {
    const int blocks = within && !args.include_self ? int(ceil_div(args.N, kBlockRows)) : 0;
    launch(kName, signed_totals<A>, args.L, kThreads, kThreads / 32 * sizeof(double), stream,
           Global<const A>{sums[0]}, Global<const A>{sums[other]}, Global<const A>{squares[0]},
           Global<A>{static_cast<A*>(args.sums)}, static_cast<int>(args.D), blocks);
    return;
  }

  SimilarityKernel<T> a{};
  a.x = v[0];
  a.y = v[1];
  a.x_rates = {rates[0]};
  a.y_rates = {rates[other]};
  a.x_sums = {place(at.parts[0])};
  a.y_sums = {place(at.parts[other])};
  a.row_tiles = static_cast<int>(ceil_div(args.N, Tile::kSize));
  a.column_tiles = static_cast<int>(ceil_div(args.M, Tile::kSize));
  a.tiles = within ? a.row_tiles * (a.row_tiles + 1) / 2 : a.row_tiles * a.column_tiles;
  a.within = within;
  a.include_self = args.include_self;
  a.column_sums = within || args.saved;
  a.keep_signs = args.saved && args.penalty != Penalty::kSquare;
  a.signs = {args.saved ? in_words<uint32_t>(args.saved, saved.signs) : nullptr};
  a.penalty = args.penalty;
  const int64_t others = (2 + Tile::kDown) * Tile::kSize * sizeof(A);
  a.stages = cosine_stages<T>(shared_memory_limit(kName), others);
  launch(kName, similarity_tile<T>, args.L * a.tiles, Tile::kThreads,
         a.stages * Tile::kStage * int64_t(sizeof(T)) + others, stream, a);

  for (int s = 0; s < (args.saved ? sets : 1); ++s) {
    const int blocks = static_cast<int>(ceil_div(v[s].count, kSumRows));
    A* totals = blocks > 1 ? place(at.totals) : static_cast<A*>(args.sums);
    launch(kName, sum_tiles<A>, args.L * blocks, kSumRows, kSumRows / 32 * sizeof(double), stream,
           Global<const A>{place(at.parts[s])}, Global<A>{sums[s]}, Global<A>{totals}, v[s].count,
           s == 0 ? a.column_tiles : a.row_tiles, blocks, args.saved != nullptr, s == 0);
    if (s == 0 && blocks > 1)
      launch_sum_parts(kName, totals, static_cast<A*>(args.sums), args.L, blocks, 1, stream);
  }
}

}  // namespace

int64_t pairwise_cosine_saved_words(const CosineArgs& args) { return CosineSaved(args).words; }

int64_t pairwise_cosine_fwd_scratch(const CosineForward& args) {
  return with_type(args, [&](auto number) { return Places<decltype(number)>(args).size; });
}

void pairwise_cosine_fwd(const CosineForward& args, void* scratch, void* stream) {
  if (args.L == 0) return;
  if (args.N < 1 || args.M < 1 || args.D < 1)
    throw std::invalid_argument(
        "pairwise_cosine: the CUDA kernels need at least one vector of at least one feature");
  with_type(args, [&](auto number) { forward<decltype(number)>(args, scratch, stream); });
}

}  // namespace vitdiv::cuda
