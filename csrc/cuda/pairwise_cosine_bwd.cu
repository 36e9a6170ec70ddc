// Backward of pairwise cosine penalties; the maths is in vitdiv_kernels/ops/pairwise_cosine/README.md.
//
// A block owns a tile of the gradient, vectors by features, and walks over the other vectors, 32 at a time: it makes unit
// vectors of them in shared memory and multiplies them with the slopes of the penalty. The slopes of abs and relu are made
// from the forward's signs in the registers of the product; those of square are the similarities, made again. What the
// normalisation takes out is known from the forward's sums of penalties, so that no block needs whole vectors.
#include "pairwise_cosine_bwd.cuh"

namespace vitdiv::cuda {
namespace {

constexpr const char* kName = "pairwise_cosine_bwd";

// From the gradient of unit vectors to that of x. A warp turns 32 x 16 of it at a time in shared memory, so that each lane
// has a piece of a row.
template <class T, class Layout>
DEVICE void write_gradient(const GradientKernel<T>& a, typename CosineTile<T>::Sums& acc,
                           const CosinePart<T>& part, Shared<T> memory, int64_t item, int row0, int k0) {
  using A = Acc<T>;
  constexpr int piece = kPiece<T>, pieces = 16 / piece;
  const A factor = a.factor * a.dsums.ld(item);
  const int place = thread_x() / 32 * Layout::kTurned;
  const Shared<A> turned = memory.template as<A>().part(place, Layout::kTurned);
  UNROLLED_FOR (int g = 0; g < CosineTile<T>::kGroups; ++g) {
    if (g >= part.end) continue;
    UNROLLED_FOR (int h = 0; h < 2; ++h) {
      sync_warp();
      UNROLLED_FOR (int r = 0; r < 2; ++r)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int i = 0; i < 2; ++i)
            store2(turned, (16 * r + tile_row(2 * i)) * Layout::kTurnedStride + 8 * j + tile_col(0),
                   acc[g][h][r][j][2 * i], acc[g][h][r][j][2 * i + 1]);
      sync_warp();
      ROLLED_FOR (int p = lane_id(); p < 32 * pieces; p += 32) {
        const int from = p / pieces, at = row0 + part.row + from, column = p % pieces * piece;
        const int k = k0 + part.column + 32 * g + 16 * h + column;
        if (at >= a.x.count || k >= a.x.width) continue;
        const A rate = a.x_rates.ld(item * a.x.count + at);
        const A along = rate * (rate < a.inverse_eps ? a.x_sums.ld(item * a.x.count + at) : A(0));
        const int64_t x = item * a.x.item + at * a.x.row + k, dx = item * a.dx_item + at * a.dx_row + k;
        A v[piece], out[piece];
        if (a.pieces)
          unpack<T>(a.x.data.template ld<uint4>(x), v);
        else
          UNROLLED_FOR (int i = 0; i < piece; ++i)
            v[i] = k + i < a.x.width ? A(to_float(a.x.data.ld(x + i))) : A(0);
        UNROLLED_FOR (int i = 0; i < piece; ++i)
          out[i] = factor * rate * (turned.ld(from * Layout::kTurnedStride + column + i) - v[i] * along);
        if (a.pieces)
          a.dx.template st<uint4>(dx, pack<T>(out));
        else
          UNROLLED_FOR (int i = 0; i < piece; ++i)
            if (k + i < a.x.width) a.dx.st(dx + i, from_acc<T>(out[i]));
      }
    }
  }
}

template <class T, bool SIGNS>
KERNEL LAUNCH_BOUNDS(CosineTile<T>::kThreads, SIGNS && sizeof(T) == 2 ? 2 : 1)
    gradient_tile(GradientKernel<T> a) {
  using Tile = CosineTile<T>;
  using Layout = GradientLayout<T, SIGNS>;
  using A = Acc<T>;
  const int n = a.x.count, m = a.y.count, tiles = a.row_tiles * a.width_tiles, tile = block_x() % tiles;
  const int64_t item = block_x() / tiles;
  const int row0 = tile / a.width_tiles * Layout::kRows, k0 = tile % a.width_tiles * Layout::kWidth;
  const auto part = SIGNS ? CosinePart<T>::of_column(row0, k0, n, a.x.width)
                          : CosinePart<T>::of_square(row0, k0, n, a.x.width, false);  // of the gradient
  const int row = row0 + part.row, lane = lane_id();
  const int64_t x_item = item * a.x.item, y_item = item * a.y.item;
  Carver carve;
  const Shared<T> memory = carve.take<T>(Layout::kSize);
  UnitVectors<T, Layout> unit{a.y, a.y_rates, y_item, item * m, k0, {}, {}};
  typename Tile::Sums acc = {};

  // acc += slopes of 16 r + row, first ... first + 31, times the unit vectors at `from`
  const auto add = [&](int from, auto left) {
    if (!part.any()) return;
    for_each_step<T>(32, [&](int j) {
      FragmentA<T> w[2];
      UNROLLED_FOR (int r = 0; r < 2; ++r) left(w[r], r, j);
      UNROLLED_FOR (int g = 0; g < Tile::kGroups; ++g) {
        if (g >= part.end) continue;
        UNROLLED_FOR (int h = 0; h < 2; ++h) {
          FragmentB<T> b[2];
          load_b<true>(b, memory, [&](int column, int k) {
            return from + (j + k) * Layout::kUnitStride + part.column + 32 * g + 16 * h + column;
          });
          UNROLLED_FOR (int r = 0; r < 2; ++r) multiply_add<T, SIGNS>(acc[g][h][r], w[r], b);
        }
      }
    });
  };

  if constexpr (SIGNS) {
    unit.load(0);
    SignWords next = sign_words(a, item, row, 0);
    for (int first = 0; first < m; first += 32) {
      const int to = first / 32 % 2 * Layout::kUnit;
      unit.store(memory.part(to, Layout::kUnit), first);
      SignWords words = next;
      sync_block();  // the other buffer was read before it
      if (first + 32 < m) {
        unit.load(first + 32);
        next = sign_words(a, item, row, first + 32);
      }
      uint32_t mine[2][4];
      UNROLLED_FOR (int p = 0; p < 2; ++p) {
        if (a.within ? first < row : a.turned) words.plane[p] = transpose32(words.plane[p]);
        UNROLLED_FOR (int i = 0; i < 4; ++i) mine[p][i] = warp_shuffle(words.plane[p], 8 * i + (lane >> 2));
      }
      add(to, [&](FragmentA<T>& w, int r, int j) {
        const uint32_t positive[2] = {mine[0][2 * r], mine[0][2 * r + 1]},
                       negative[2] = {mine[1][2 * r], mine[1][2 * r + 1]};
        slopes<T>(w, positive, negative, j);
      });
    }
  } else {
    const CosineProducts<T> products{memory, 2, Tile::kStage, Tile::kSize};
    for (int column0 = 0; column0 < m; column0 += Tile::kSize) {
      const auto square = CosinePart<T>::of_square(row0, column0, n, m, false);
      const bool diagonal = a.within && row0 == column0;
      typename Tile::Sums s = {};
      sync_block();  // the memory may still be in use
      products.add(s, square, a.x, x_item, row0, a.y, y_item, column0, diagonal, [](int) {});
      sync_block();
      A row_rate[2][2];
      UNROLLED_FOR (int r = 0; r < 2; ++r)
        UNROLLED_FOR (int i = 0; i < 2; ++i) {
          const int at = row + 16 * r + tile_row(2 * i);
          row_rate[r][i] = at < n ? a.x_rates.ld(item * n + at) : A(0);
        }
      UNROLLED_FOR (int g = 0; g < Tile::kGroups; ++g)
        UNROLLED_FOR (int h = 0; h < 2; ++h)
          UNROLLED_FOR (int j = 0; j < 2; ++j) {
            const int to = square.column + 32 * g + 16 * h + 8 * j + tile_col(0), column = column0 + to;
            A rate[2];
            UNROLLED_FOR (int e = 0; e < 2; ++e)
              rate[e] = column + e < m ? a.y_rates.ld(item * m + column + e) : A(0);
            UNROLLED_FOR (int r = 0; r < 2; ++r)
              UNROLLED_FOR (int i = 0; i < 2; ++i) {
                const int from = 16 * r + tile_row(2 * i);
                A w[2];
                UNROLLED_FOR (int e = 0; e < 2; ++e) {
                  const bool counts = row + from < n && column + e < m &&
                                      !(a.within && !a.include_self && row + from == column + e);
                  w[e] = counts ? s[g][h][r][j][2 * i + e] * row_rate[r][i] * rate[e] : A(0);
                }
                store2(memory, (square.row + from) * Layout::kSlopeStride + to, w[0], w[1]);
              }
          }
      const int end = m - column0 < Tile::kSize ? m - column0 : Tile::kSize;
      for (int first = 0; first < end; first += 32) {
        sync_block();  // keeps the compiler from loading while the similarities take the registers
        unit.load(column0 + first);
        unit.store(memory.part(Layout::kSlopes, Layout::kUnit), column0 + first);
        sync_block();
        add(Layout::kSlopes, [&](FragmentA<T>& w, int r, int j) {
          load_a(w, memory, [&](int at, int k) {
            return (part.row + 16 * r + at) * Layout::kSlopeStride + first + j + k;
          });
        });
      }
    }
  }

  sync_block();  // the memory may still be in use
  if (part.any()) write_gradient<T, Layout>(a, acc, part, memory, item, row0, k0);
}

// Of set s against the other, or of x against itself.
template <class T, bool SIGNS>
void gradient(const CosineBackward& args, int s, const BatchView& dx, void* stream) {
  using A = Acc<T>;
  using Layout = GradientLayout<T, SIGNS>;
  const bool within = !args.y.data;
  const CosineSaved saved(args);
  const auto numbers = [&](int64_t word) { return Global<const A>{in_words<const A>(args.saved, word)}; };
  GradientKernel<T> a{};
  a.x = set_of<T>(args, s);
  a.y = set_of<T>(args, 1 - s);
  const Vectors<T> out = vectors<T>(s ? "dy" : "dx", dx, args.L, a.x.count, args.D);
  a.x_rates = numbers(saved.rates[s]);
  a.y_rates = numbers(saved.rates[1 - s]);
  a.x_sums = numbers(saved.sums[s]);
  a.dsums = {static_cast<const A*>(args.dsums)};
  a.signs = {in_words<const uint32_t>(args.saved, saved.signs)};
  a.within = within;
  a.turned = s == 1;
  a.include_self = args.include_self;
  a.pieces = a.x.pieces && out.pieces;
  a.planes = args.penalty == Penalty::kAbs ? 2 : 1;
  a.row_tiles = static_cast<int>(ceil_div(a.x.count, Layout::kRows));
  a.width_tiles = static_cast<int>(ceil_div(a.x.width, Layout::kWidth));
  a.factor = A(within ? 2 : 1) * A(SIGNS ? 1 : 2);
  a.inverse_eps = static_cast<A>(inverse_of(args.eps));
  a.dx = {const_cast<T*>(out.data.p)};
  a.dx_item = out.item;
  a.dx_row = out.row;
  launch(kName, gradient_tile<T, SIGNS>, args.L * a.row_tiles * a.width_tiles, CosineTile<T>::kThreads,
         Layout::kSize * int64_t(sizeof(T)), stream, a);
}

template <class T>
void gradient(const CosineBackward& args, int s, const BatchView& dx, void* stream) {
  if (!dx.data) return;
  if (args.penalty == Penalty::kSquare)
    gradient<T, false>(args, s, dx, stream);
  else
    gradient<T, true>(args, s, dx, stream);
}

}  // namespace

int64_t pairwise_cosine_bwd_scratch(const CosineBackward&) { return 0; }

void pairwise_cosine_bwd(const CosineBackward& args, void*, void* stream) {
  if (args.L == 0) return;
  if (args.penalty == Penalty::kSigned) return signed_backward(args, stream);
  with_type(args, [&](auto number) {
    using T = decltype(number);
    gradient<T>(args, 0, args.dx, stream);
    gradient<T>(args, 1, args.dy, stream);
  });
}

}  // namespace vitdiv::cuda
