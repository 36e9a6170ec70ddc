// Forward of the penalties of pairwise cosines that need all pairs; the maths is in
// vitdiv_kernels/ops/pairs/pairwise_cosine/README.md.
//
// Raw vectors are multiplied, the products take the inverse norms, and penalties are summed along rows and
// along columns. Of pairs within x only the upper triangle is made, and counts both ways. A short set of
// 16-bit vectors is one block's work, which reads it once, for norms and products. Others are cut into square
// tiles; each has a slot of its own for its sums, which are added in order, and a kernel before has read the
// norms.
#include "pairwise_cosine.cuh"

namespace vitdiv::cuda {
namespace {

constexpr const char* kName = "pairwise_cosine_fwd";
constexpr int kSumRows = 256;  // vectors whose sums a block adds

template <class T>
struct SimilarityKernel {
  Vectors<T> x;                          // [items, N, D]
  Vectors<T> y;                          // [items, M, D]
  Global<const Acc<T>> x_inverse_norms;  // [items, N]; not of whole sets
  Global<const Acc<T>> y_inverse_norms;  // [items, M]; not of whole sets
  Global<Acc<T>> x_sums;                 // [items, column tiles, N]; of a whole set [items, N]
  Global<Acc<T>> y_sums;                 // [items, row tiles, M]
  Global<Acc<T>> inverse_norms;          // [items, N]; of whole sets
  Global<Acc<T>> totals;                 // [items]; of whole sets
  Global<uint32_t> signs;                // [items, N, 1 or 2, ceil(M / 32)]
  int row_tiles;
  int column_tiles;
  int tiles;    // of an item
  int stages;   // of the products' ring in shared memory
  bool within;  // y is x
  bool include_self;
  bool column_sums;  // are wanted
  bool keep;         // for the backward
  bool keep_signs;
  Penalty penalty;
  Acc<T> eps;
  Acc<T> inverse_eps;
};

template <class A>
DEVICE A penalise(Penalty penalty, A s) {
  if (penalty == Penalty::kSquare) return s * s;
  return s < 0 ? (penalty == Penalty::kAbs ? -s : A(0)) : s;  // a NaN stays
}

// Where a block leaves the sums along its rows and columns: one place for each warp that has a part of them.
template <class T, bool WHOLE>
struct SumPlaces {
  static constexpr int kAcross = WHOLE ? (CosineTile<T>::kWhole + 1) / 2 : 2,
                       kDown = WHOLE ? CosineTile<T>::kWhole : CosineTile<T>::kDown;
  static constexpr int kSize = WHOLE ? 32 * CosineTile<T>::kWhole : CosineTile<T>::kSize;
  static constexpr int kNumbers =
      (kAcross + kDown + (WHOLE ? 1 : 0)) * kSize;  // with a whole set's inverse norms
};

template <class T, bool WHOLE>
inline constexpr int kMostThreads = WHOLE ? 512 : CosineTile<T>::kThreads;

// S[i, j] = x̂_i . ŷ_j; x_sums[i] = sum over j of the tile of penalty(S[i, j]), y_sums[j] over i.
template <class T, bool WHOLE>
KERNEL LAUNCH_BOUNDS((kMostThreads<T, WHOLE>), (sizeof(T) == 2 && !WHOLE ? 2 : 1))
    similarity_tile(SimilarityKernel<T> a) {
  using Tile = CosineTile<T>;
  using Places = SumPlaces<T, WHOLE>;
  using A = Acc<T>;
  const int lane = lane_id(), n = a.x.count, m = a.y.count;
  const auto [row_tile, column_tile] = tile_place(block_x() % a.tiles, a.row_tiles, a.column_tiles, a.within);
  const int64_t item = block_x() / a.tiles;
  const int row0 = row_tile * Places::kSize, column0 = column_tile * Places::kSize;
  const bool diagonal = a.within && row_tile == column_tile;
  const int most = WHOLE ? (n + 31) / 32 * 32 : Tile::kSize, stage = (WHOLE ? 1 : 2) * most * Tile::kStride;
  Carver carve;
  const CosineProducts<T> products{carve.take<T>(a.stages * stage), a.stages, stage, most};
  const Shared<A> row_sums = carve.take<A>(Places::kAcross * Places::kSize),
                  column_sums = carve.take<A>(Places::kDown * Places::kSize),
                  inverse_norms = carve.take<A>(WHOLE ? Places::kSize : 0);
  const Shared<double> total = carve.take<double>(WHOLE ? threads() / 32 : 0);

  const auto part = WHOLE ? CosinePart<T>::of_triangle((n + 31) / 32)
                          : CosinePart<T>::of_tile(row0, column0, n, m, a.within);
  CosineSums<T> acc = {};
  Powers<T> powers{};
  if constexpr (WHOLE) {
    // Two threads read each vector once more, in shared memory.
    const int mine = thread_x() / 2, from = mine * Tile::kStride + thread_x() % 2 * (Tile::kChunk / 2);
    A squares = 0;
    products.add(
        acc, part, a.x, item * a.x.item, 0, a.x, 0, 0, true, powers, [](int, int) { return A(0); },
        [&](int at) {
          if (mine >= most) return;
          UNROLLED_FOR (int i = 0; i < Tile::kChunk / 2; i += kPiece<T>) {
            A v[kPiece<T>];
            unpack<T>(products.memory.template ld<uint4>(at + from + i), v);
            UNROLLED_FOR (int e = 0; e < kPiece<T>; ++e) squares += v[e] * v[e];
          }
        });
    squares += warp_shuffle_xor(squares, 1);
    if (mine < most && thread_x() % 2 == 0) {
      const A inverse_norm = inverse_of_norm(square_root(squares), a.eps, a.inverse_eps);
      inverse_norms.st(mine, inverse_norm);
      if (a.keep && mine < n) a.inverse_norms.st(item * n + mine, inverse_norm);
    }
    sync_block();
  } else {
    const auto inverse_norm = [&](int set, int i) {
      const int at = (set ? column0 : row0) + i, count = set ? m : n;
      return at < count ? (set ? a.y_inverse_norms : a.x_inverse_norms).ld(item * count + at) : A(0);
    };
    products.add(acc, part, a.x, item * a.x.item, row0, a.y, item * a.y.item, column0, diagonal,
                 Powers<T>::of_tile(Tile::kSize, inverse_norm), inverse_norm, [](int) {});
    powers = Powers<T>::of_tile(Tile::kSize, inverse_norm);  // again: no register is left to keep it
  }

  const int row = row0 + part.row, words = (m + 31) / 32, planes = a.penalty == Penalty::kAbs ? 2 : 1;
  A inverse_norm[2][2], sum[2][2] = {};
  UNROLLED_FOR (int r = 0; r < 2; ++r)
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const int at = row + 16 * r + tile_row(2 * i);
      inverse_norm[r][i] = at >= n ? A(0)
                           : WHOLE ? inverse_norms.ld(at)
                                   : powers.left_of(a.x_inverse_norms.ld(item * n + at));
    }
  UNROLLED_FOR (int g = 0; g < Tile::kGroups; ++g) {
    const bool active = g >= part.first && g < part.end;
    if (WHOLE && !active) continue;
    const int column = column0 + part.column + 32 * g;
    const bool mirrored = active && (a.within ? column > row : a.column_sums);
    uint32_t positive[2][2] = {}, negative[2][2] = {};
    UNROLLED_FOR (int h = 0; h < 2; ++h)
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        UNROLLED_FOR (int e = 0; e < 2; ++e) {
          const int bit = 16 * h + 8 * j + tile_col(e), to = column + bit;
          const A column_inverse_norm = to >= m ? A(0)
                                        : WHOLE ? inverse_norms.ld(to)
                                                : powers.left_of(a.y_inverse_norms.ld(item * m + to));
          A column_sum = 0;
          UNROLLED_FOR (int r = 0; r < 2; ++r)
            UNROLLED_FOR (int i = 0; i < 2; ++i) {
              const int from = row + 16 * r + tile_row(2 * i);
              const bool counts = from < n && to < m && (!a.within || a.include_self || from != to);
              const A s =
                  counts ? acc[g][h][r][j][2 * i + e] * inverse_norm[r][i] * column_inverse_norm : A(0);
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
            column_sums.st(part.row / 32 * Places::kSize + to - column0, mirrored ? column_sum : A(0));
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
  const int across = (WHOLE ? part.column - part.row : part.column) / (32 * Tile::kGroups);
  if (!WHOLE || part.any())
    UNROLLED_FOR (int r = 0; r < 2; ++r)
      UNROLLED_FOR (int i = 0; i < 2; ++i) {
        sum[r][i] = quad_sum(sum[r][i]);
        if ((lane & 3) == 0)
          row_sums.st(across * Places::kSize + part.row + 16 * r + tile_row(2 * i), sum[r][i]);
      }
  sync_block();

  if constexpr (WHOLE) {
    double own = 0;
    for (int c = thread_x(); c < n; c += threads()) {
      A sum_of_both = 0;
      for (int w = 0; w < CosinePart<T>::strips(most / 32 - c / 32); ++w)
        sum_of_both += row_sums.ld(w * Places::kSize + c);
      for (int w = 0; w < c / 32; ++w) sum_of_both += column_sums.ld(w * Places::kSize + c);
      if (a.keep) a.x_sums.st(item * n + c, sum_of_both);
      own += sum_of_both;
    }
    own = block_sum(own, total);
    if (thread_x() == 0) a.totals.st(item, static_cast<A>(own));
  } else {
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
}

// sums[i] = sum_t parts[t, i], if it is kept; totals[block] = the sum of those of a block's vectors.
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

template <class T>
bool is_whole(const CosineArgs& args) {
  return !args.y.data && args.N <= 32 * CosineTile<T>::kWhole;
}

// Places in scratch, in bytes.
template <class T>
struct Places : Pieces {
  int64_t inverse_norms[2], parts[2], totals;
  explicit Places(const CosineForward& args) : Pieces(args.x.dtype) {
    const int64_t counts[2] = {args.N, args.M}, tile = CosineTile<T>::kSize, L = args.L;
    if (is_whole<T>(args)) return;
    for (int s = 0; s < (args.y.data ? 2 : 1); ++s) {
      inverse_norms[s] = take(args.saved ? 0 : L * counts[s]);
      parts[s] = take(L * ceil_div(counts[1 - s], tile) * counts[s]);
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
  const bool within = !args.y.data;
  const int sets = within ? 1 : 2, other = sets - 1;
  const auto place = [&](int64_t byte) { return place_in<A>(scratch, byte); };
  const auto kept = [&](int64_t word) { return args.saved ? in_words<A>(args.saved, word) : nullptr; };
  SimilarityKernel<T> a{};
  a.x = set_of<T>(args, 0);
  a.y = set_of<T>(args, 1);
  a.within = within;
  a.include_self = args.include_self;
  a.column_sums = within || args.saved;
  a.keep = args.saved;
  a.keep_signs = args.saved && args.penalty != Penalty::kSquare;
  a.signs = {args.saved ? in_words<uint32_t>(args.saved, saved.signs) : nullptr};
  a.penalty = args.penalty;
  if constexpr (Tile::kWhole > 0)
    if (is_whole<T>(args)) {
      const int squares = (a.x.count + 31) / 32;
      int warps = 0;
      for (int s = 1; s <= squares; ++s) warps += CosinePart<T>::strips(s);
      warps = warps < 2 * squares ? 2 * squares : warps;  // two threads for each vector
      a.row_tiles = a.column_tiles = a.tiles = 1;
      a.eps = static_cast<A>(args.eps);
      a.inverse_eps = static_cast<A>(inverse_of(args.eps));
      a.inverse_norms = {kept(saved.inverse_norms[0])};
      a.x_sums = {kept(saved.sums[0])};
      a.totals = {static_cast<A*>(args.sums)};
      const int64_t stage = 32 * squares * Tile::kStride * int64_t(sizeof(T)),
                    others = SumPlaces<T, true>::kNumbers * sizeof(A) + (warps + 1) / 2 * 16;
      a.stages = stages_of(kName, stage, others, 1);
      launch(kName, similarity_tile<T, true>, args.L, 32 * warps, a.stages * stage + others, stream, a);
      return;
    }

  A* inverse_norms[2];
  for (int s = 0; s < sets; ++s) {
    inverse_norms[s] = args.saved ? kept(saved.inverse_norms[s]) : place(at.inverse_norms[s]);
    vector_inverse_norms(kName, args, s, inverse_norms[s], stream);
  }
  a.x_inverse_norms = {inverse_norms[0]};
  a.y_inverse_norms = {inverse_norms[other]};
  a.x_sums = {place(at.parts[0])};
  a.y_sums = {place(at.parts[other])};
  a.row_tiles = static_cast<int>(ceil_div(args.N, Tile::kSize));
  a.column_tiles = static_cast<int>(ceil_div(args.M, Tile::kSize));
  a.tiles = within ? a.row_tiles * (a.row_tiles + 1) / 2 : a.row_tiles * a.column_tiles;
  const int64_t stage = Tile::kStage * int64_t(sizeof(T)), others = SumPlaces<T, false>::kNumbers * sizeof(A);
  a.stages = stages_of(kName, stage, others, 2);
  launch(kName, similarity_tile<T, false>, args.L * a.tiles, Tile::kThreads, a.stages * stage + others,
         stream, a);

  for (int s = 0; s < (args.saved ? sets : 1); ++s) {
    const int count = s ? a.y.count : a.x.count, blocks = static_cast<int>(ceil_div(count, kSumRows));
    A* totals = blocks > 1 ? place(at.totals) : static_cast<A*>(args.sums);
    launch(kName, sum_tiles<A>, args.L * blocks, kSumRows, kSumRows / 32 * sizeof(double), stream,
           Global<const A>{place(at.parts[s])}, Global<A>{kept(saved.sums[s])}, Global<A>{totals}, count,
           s == 0 ? a.column_tiles : a.row_tiles, blocks, args.saved != nullptr, s == 0);
    if (s == 0 && blocks > 1)
      launch_sum_parts(kName, totals, static_cast<A*>(args.sums), args.L, blocks, 1, stream);
  }
}

}  // namespace

int64_t pairwise_cosine_saved_words(const CosineArgs& args) { return CosineSaved(args).words; }

int64_t pairwise_cosine_fwd_scratch(const CosineForward& args) {
  if (args.penalty == Penalty::kSigned) return signed_forward_scratch(args);
  return with_type(args.x.dtype, [&](auto number) { return Places<decltype(number)>(args).size; });
}

void pairwise_cosine_fwd(const CosineForward& args, void* scratch, void* stream) {
  if (args.L == 0) return;
  if (args.N < 1 || args.M < 1 || args.D < 1)
    throw std::invalid_argument(
        "pairwise_cosine: the CUDA kernels need at least one vector of at least one feature");
  if (args.penalty == Penalty::kSigned) return signed_forward(args, scratch, stream);
  with_type(args.x.dtype, [&](auto number) { forward<decltype(number)>(args, scratch, stream); });
}

}  // namespace vitdiv::cuda
