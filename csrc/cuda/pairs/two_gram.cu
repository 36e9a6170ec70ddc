// Forward of penalties on two Gram matrices; the maths is in vitdiv_kernels/ops/pairs/two_gram/README.md.
//
// A block makes one tile of both matrices and sums its penalties. Only the upper triangle is made, and counts
// both ways. A tile's sum has a place of its own; they are added in order.
#include "pair_products.cuh"
#include "two_gram.cuh"

namespace vitdiv::cuda {
namespace {

constexpr const char* kName = "two_gram_fwd";

template <class T>
struct TwoGramKernel : PairSets<T> {
  Global<Acc<T>> sums;  // [items, tiles]
  int row_tiles;
  int tiles;   // of an item
  int stages;  // of the products' ring in shared memory
  PairPenalty<Acc<T>> penalty;
};

// S = x̂ x̂^T, T = ŷ ŷ^T; sums[tile] = sum over its i, j of penalty(S[i, j], T[i, j]).
template <class T>
KERNEL LAUNCH_BOUNDS(CosineTile<T>::kThreads, 1) two_gram_tile(TwoGramKernel<T> a) {
  using Tile = CosineTile<T>;
  using A = Acc<T>;
  const int n = a.x.count;
  const auto [row_tile, column_tile] = tile_place(block_x() % a.tiles, a.row_tiles, a.row_tiles, true);
  const int64_t item = block_x() / a.tiles;
  const int row0 = row_tile * Tile::kSize, column0 = column_tile * Tile::kSize;
  Carver carve;
  const Shared<T> ring = carve.take<T>(a.stages * Tile::kStage);
  PairProducts<T, 2> made{carve.take<A>(PairProducts<T, 2>::kNorms), {}, {}, {}};
  const Shared<double> memory = carve.take<double>(Tile::kThreads / 32);
  const auto part = CosinePart<T>::of_tile(row0, column0, n, n, true);
  const bool identity = a.z.width == 0;
  made.make(a, {ring, a.stages, Tile::kStage, Tile::kSize}, part, item, row0, column0,
            row_tile == column_tile);

  const int row = row0 + part.row;
  A inverse_norm[2][2], other_inverse_norm[2][2], sum = 0;
  UNROLLED_FOR (int r = 0; r < 2; ++r)
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const int at = part.row + 16 * r + tile_row(2 * i);
      inverse_norm[r][i] = made.inverse_norm(0, 0, at);
      other_inverse_norm[r][i] = made.inverse_norm(1, 0, at);
    }
  UNROLLED_FOR (int g = 0; g < Tile::kGroups; ++g) {
    if (g < part.first || g >= part.end) continue;
    const int column = column0 + part.column + 32 * g;
    A square_sum = 0;
    UNROLLED_FOR (int h = 0; h < 2; ++h)
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        UNROLLED_FOR (int e = 0; e < 2; ++e) {
          const int to = column + 16 * h + 8 * j + tile_col(e);
          const A column_inverse_norm = made.inverse_norm(0, 1, to - column0),
                  other_column_inverse_norm = made.inverse_norm(1, 1, to - column0);
          UNROLLED_FOR (int r = 0; r < 2; ++r)
            UNROLLED_FOR (int i = 0; i < 2; ++i) {
              const int from = row + 16 * r + tile_row(2 * i);
              const A x = made.s[g][h][r][j][2 * i + e] * (inverse_norm[r][i] * column_inverse_norm);
              const A y = identity ? A(from == to)
                                   : made.t[g][h][r][j][2 * i + e] *
                                         (other_inverse_norm[r][i] * other_column_inverse_norm);
              square_sum += from < n && to < n ? a.penalty.value(x, y) : A(0);
            }
        }
    sum += column > row ? 2 * square_sum : square_sum;
  }
  const double total = block_sum(sum, memory);
  if (thread_x() == 0) a.sums.st(block_x(), static_cast<A>(total));
}

// Places in scratch, in bytes.
struct Places : Pieces {
  int64_t inverse_norms[2], sums;
  explicit Places(const TwoGramArgs& args) : Pieces(args.x.dtype) {
    const int64_t tile =
        with_type(args.x.dtype, [](auto number) { return int64_t(CosineTile<decltype(number)>::kSize); });
    const int64_t tiles = ceil_div(args.N, tile);
    inverse_norms[0] = inverse_norms[1] = take(args.L * args.N);
    if (args.y.data && args.normalise) inverse_norms[1] = take(args.L * args.N);
    sums = take(args.L * tiles * (tiles + 1) / 2);
  }
};

template <class T>
void forward(const TwoGramForward& args, void* scratch, void* stream) {
  using A = Acc<T>;
  using Tile = CosineTile<T>;
  const Places at(args);
  const auto place = [&](int64_t byte) { return place_in<A>(scratch, byte); };
  A* const inverse_norms[2] = {place(at.inverse_norms[0]), place(at.inverse_norms[1])};
  const int row_tiles = static_cast<int>(ceil_div(args.N, Tile::kSize)),
            tiles = row_tiles * (row_tiles + 1) / 2;
  A* const sums = tiles > 1 ? place(at.sums) : static_cast<A*>(args.sums);
  const int64_t stage = Tile::kStage * int64_t(sizeof(T)),
                others = PairProducts<T, 2>::kNorms * sizeof(A) + Tile::kThreads / 32 * sizeof(double);
  TwoGramKernel<T> a{};
  a.x = a.y = gram_vectors<T>(args, 0);
  a.z = gram_vectors<T>(args, 1);
  a.x_inverse_norms = a.y_inverse_norms = {inverse_norms[0]};
  a.z_inverse_norms = {inverse_norms[1]};
  a.sums = {sums};
  a.row_tiles = row_tiles;
  a.tiles = tiles;
  a.stages = stages_of(kName, stage, others, 1);
  a.penalty = pair_penalty<A>(args);
  gram_inverse_norms(kName, args, inverse_norms, stream);
  launch(kName, two_gram_tile<T>, args.L * tiles, Tile::kThreads, a.stages * stage + others, stream, a);
  if (tiles > 1) launch_sum_parts(kName, sums, static_cast<A*>(args.sums), args.L, tiles, 1, stream);
}

}  // namespace

int64_t two_gram_fwd_scratch(const TwoGramForward& args) { return Places(args).size; }

void two_gram_fwd(const TwoGramForward& args, void* scratch, void* stream) {
  if (args.L == 0) return;
  check_sizes(args);
  with_type(args.x.dtype, [&](auto number) { forward<decltype(number)>(args, scratch, stream); });
}

}  // namespace vitdiv::cuda
