// Backward of pairwise cosine penalties; the maths is in vitdiv_kernels/ops/pairwise_cosine/README.md.
//
// A block owns a tile of the gradient, vectors by features, and walks over the other vectors, 32 at a time: it makes unit
// vectors of them in shared memory and multiplies them with the slopes of the penalty. The slopes of abs and relu are made
// from the forward's signs in the registers of the product; those of square are the similarities, made again. What the
// normalisation takes out is known from the forward's sums of penalties, so that no block needs whole vectors.
#include <algorithm>

#include "pairwise_cosine.cuh"

namespace vitdiv::cuda {
namespace {

constexpr const char* kName = "pairwise_cosine_bwd";
constexpr int kThreads = 256, kBlockRows = 32;  // of signed

template <class T>
struct GradientKernel {
  Vectors<T> x, y;  // the gradient is that of x
  Global<const Acc<T>> x_rates, y_rates, x_sums, dsums;
  Global<const uint32_t> signs;
  bool within, turned, include_self;  // turned: signs stand in rows of y
  bool pieces;                        // x and dx are in pieces of 16 bytes
  int planes, row_tiles, width_tiles;
  Acc<T> factor, inverse_eps;
  Global<T> dx;
  int64_t dx_item, dx_row;
};

// 32 other vectors by kSize features, as the right factor; places of the left factor of square.
template <class T>
struct GradientLayout {
  using Tile = CosineTile<T>;
  static constexpr int kUnitStride =
      Tile::kSize + (sizeof(T) == 8 ? 4 : 8);  // columns of a fragment: no two in one bank
  static constexpr int kUnit = 32 * kUnitStride;
  static constexpr int kSlopeStride = row_stride<T>(Tile::kSize), kSlopes = Tile::kSize * kSlopeStride;
  // 32 x 16 of the gradient of unit vectors, on their way out
  static constexpr int kTurnedStride = 16 + Numbers<Acc<T>>::kPad, kTurned = 32 * kTurnedStride;
  static constexpr int kAllTurned = Tile::kThreads / 32 * kTurned * int(sizeof(Acc<T>) / sizeof(T));
  static constexpr int kSigns = std::max(2 * kUnit, kAllTurned);
  // of square: the products' ring, later in the same place the slopes and unit vectors
  static constexpr int kSquare = std::max(2 * Tile::kStage, kSlopes + kUnit);
  static constexpr int kPieces = 32 * Tile::kSize / kPiece<T> / Tile::kThreads;  // of a thread
};

// The unit vectors' way into shared memory: a piece waits in registers while the piece before is in use.
template <class T>
struct UnitVectors {
  using Tile = CosineTile<T>;
  using Layout = GradientLayout<T>;
  const Vectors<T>& y;
  Global<const Acc<T>> rates;
  int64_t item, first_rate;
  int k0;  // the first feature
  uint4 bits[Layout::kPieces];
  Acc<T> rate[Layout::kPieces];

  DEVICE static int row(int p) { return (p * Tile::kThreads + thread_x()) / (Tile::kSize / kPiece<T>); }
  DEVICE static int column(int p) {
    return (p * Tile::kThreads + thread_x()) % (Tile::kSize / kPiece<T>)*kPiece<T>;
  }
  DEVICE void load(int first) {
    if (!y.pieces) return;
    UNROLLED_FOR (int p = 0; p < Layout::kPieces; ++p) {
      const int j = first + row(p), k = k0 + column(p);
      const bool inside = j < y.count && k < y.width;
      bits[p] = inside ? y.data.template ld<uint4>(item + j * y.row + k) : uint4{0, 0, 0, 0};
      rate[p] = inside ? rates.ld(first_rate + j) : Acc<T>(0);
    }
  }
  DEVICE void store(Shared<T> to, int first) const {
    if (y.pieces) {
      UNROLLED_FOR (int p = 0; p < Layout::kPieces; ++p) {
        Acc<T> v[kPiece<T>];
        unpack<T>(bits[p], v);
        UNROLLED_FOR (int i = 0; i < kPiece<T>; ++i) v[i] *= rate[p];
        to.template st<uint4>(row(p) * Layout::kUnitStride + column(p), pack<T>(v));
      }
    } else {
      ROLLED_FOR (int p = thread_x(); p < 32 * Tile::kSize; p += Tile::kThreads) {
        const int j = p / Tile::kSize, k = p % Tile::kSize;
        const bool inside = first + j < y.count && k0 + k < y.width;
        const Acc<T> v = inside ? to_float(y.data.ld(item + (first + j) * y.row + k0 + k)) *
                                      rates.ld(first_rate + first + j)
                                : Acc<T>(0);
        to.st(j * Layout::kUnitStride + k, from_acc<T>(v));
      }
    }
  }
};

// A square of 32 x 32 bits, a row in each lane, is turned: lane i's bit j becomes lane j's bit i.
DEVICE uint32_t transpose32(uint32_t bits) {
  uint32_t low = 0x0000ffffu;  // the columns whose bit of that value is 0
  UNROLLED_FOR (int s = 16; s > 0; s /= 2) {
    const uint32_t other = warp_shuffle_xor(bits, s);
    bits = lane_id() & s ? (bits & ~low) | (other >> s & low) : (bits & low) | (other << s & ~low);
    low ^= low << (s / 2);
  }
  return bits;
}

// Slopes, 1, -1 or 0, as a left factor: 16 rows, of which the lane has the words of two, by kDepth columns from `column`.
template <class T>
DEVICE void slopes(FragmentA<T>& a, const uint32_t (&positive)[2], const uint32_t (&negative)[2],
                   int column) {
  const int quad = lane_id() & 3;
  if constexpr (sizeof(T) == 2) {
    const uint32_t one = from_float<T>(1).bits;
    const auto pair = [](uint32_t bits) { return (bits | bits << 15) & 0x00010001u; };
    UNROLLED_FOR (int i = 0; i < 4; ++i) {
      const int at = column + 8 * (i >> 1) + 2 * quad;
      a.r[i] = pair(positive[i & 1] >> at & 3) * one | pair(negative[i & 1] >> at & 3) * (one | 0x8000);
    }
  } else {
    const auto slope = [&](int i, int at) {
      return Acc<T>(int(positive[i] >> at & 1) - int(negative[i] >> at & 1));
    };
    if constexpr (sizeof(T) == 4)
      UNROLLED_FOR (int i = 0; i < 4; ++i) a.hi[i] = slope(i & 1, column + quad + 4 * (i >> 1)), a.lo[i] = 0;
    else
      UNROLLED_FOR (int i = 0; i < 2; ++i) a.r[i] = slope(i, column + quad);
  }
}

// The warp's rows of signs against 32 other vectors: a word of each plane in each lane.
struct SignWords {
  uint32_t plane[2];
};

template <class T>
DEVICE SignWords sign_words(const GradientKernel<T>& a, int64_t item, int row, int first) {
  // within x only squares on and above the diagonal are there
  const bool turned = a.within ? first < row : a.turned;
  const int at = (turned ? first : row) + lane_id(), count = turned ? a.y.count : a.x.count;
  const int words = ((turned ? a.x.count : a.y.count) + 31) / 32;
  const bool inside = at < count && row < a.x.count && first < a.y.count;
  const int64_t from = (item * count + at) * a.planes * words + (turned ? row : first) / 32;
  SignWords w;
  UNROLLED_FOR (int p = 0; p < 2; ++p) w.plane[p] = inside && p < a.planes ? a.signs.ld(from + p * words) : 0;
  return w;
}

// From the gradient of unit vectors to that of x. A warp turns 32 x 16 of it at a time in shared memory, so that each lane
// has a piece of a row.
template <class T>
DEVICE void write_gradient(const GradientKernel<T>& a, typename CosineTile<T>::Sums& acc,
                           const CosinePart<T>& part, Shared<T> memory, int64_t item, int row0, int k0) {
  using Layout = GradientLayout<T>;
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
  using Layout = GradientLayout<T>;
  using A = Acc<T>;
  const int n = a.x.count, m = a.y.count, tiles = a.row_tiles * a.width_tiles, tile = block_x() % tiles;
  const int64_t item = block_x() / tiles;
  const int row0 = tile / a.width_tiles * Tile::kSize, k0 = tile % a.width_tiles * Tile::kSize;
  const CosinePart<T> part(row0, k0, n, a.x.width, false);  // of the gradient
  const int row = row0 + part.row, lane = lane_id();
  const int64_t x_item = item * a.x.item, y_item = item * a.y.item;
  Carver carve;
  const Shared<T> memory = carve.take<T>(SIGNS ? Layout::kSigns : Layout::kSquare);
  UnitVectors<T> unit{a.y, a.y_rates, y_item, item * m, k0, {}, {}};
  typename Tile::Sums acc = {};

  // acc += slopes of 16 r + row, first ... first + 31, times the unit vectors at `from`
  const auto add = [&](int from, auto left) {
    if (part.first >= part.end) return;
    for (int j = 0; j < 32; j += kDepth<T>) {
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
    }
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
    const CosineProducts<T> products{memory, 2};
    for (int column0 = 0; column0 < m; column0 += Tile::kSize) {
      const CosinePart<T> square(row0, column0, n, m, false);
      const bool diagonal = a.within && row0 == column0;
      typename Tile::Sums s = {};
      sync_block();  // the memory may still be in use
      products.add(s, square, a.x, x_item, row0, a.y, y_item, column0, diagonal);
      sync_block();
      UNROLLED_FOR (int r = 0; r < 2; ++r)
        UNROLLED_FOR (int i = 0; i < 2; ++i) {
          const int from = 16 * r + tile_row(2 * i);
          const A rate = row + from < n ? a.x_rates.ld(item * n + row + from) : A(0);
          UNROLLED_FOR (int g = 0; g < Tile::kGroups; ++g)
            UNROLLED_FOR (int h = 0; h < 2; ++h)
              UNROLLED_FOR (int j = 0; j < 2; ++j) {
                const int to = square.column + 32 * g + 16 * h + 8 * j + tile_col(0);
                A w[2];
                UNROLLED_FOR (int e = 0; e < 2; ++e) {
                  const int column = column0 + to + e;
                  const bool counts =
                      row + from < n && column < m && !(a.within && !a.include_self && row + from == column);
                  w[e] = counts ? s[g][h][r][j][2 * i + e] * rate * a.y_rates.ld(item * m + column) : A(0);
                }
                store2(memory, (square.row + from) * Layout::kSlopeStride + to, w[0], w[1]);
              }
        }
      const int end = m - column0 < Tile::kSize ? m - column0 : Tile::kSize;
      for (int first = 0; first < end; first += 32) {
        unit.load(column0 + first);
        sync_block();
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
  if (part.first < part.end) write_gradient<T>(a, acc, part, memory, item, row0, k0);
}

template <class T>
struct SignedKernel {
  Vectors<T> x;
  Global<const Acc<T>> rates, sums, dsums;
  int blocks;  // of an item
  bool less_itself;
  Acc<T> factor, inverse_eps;
  Global<T> dx;
  int64_t dx_item, dx_row;
};

// dx = rate (u - x̂ (x̂ . u)), u being the sum of unit vectors; the part of x̂ itself in u has no gradient, but where it was
// divided by eps.
template <class T>
KERNEL LAUNCH_BOUNDS(kThreads, 1) signed_gradient(SignedKernel<T> a) {
  using A = Acc<T>;
  const int64_t item = block_x() / a.blocks, sums = item * a.x.width;
  const int row0 = block_x() % a.blocks * kBlockRows;
  const A factor = a.factor * a.dsums.ld(item);
  for (int i = row0 + thread_x() / 32; i < row0 + kBlockRows && i < a.x.count; i += kThreads / 32) {
    const int64_t x = item * a.x.item + i * a.x.row, dx = item * a.dx_item + i * a.dx_row;
    const A rate = a.rates.ld(item * a.x.count + i);
    A along = 0;
    for (int k = lane_id(); k < a.x.width; k += 32)
      along += to_float(a.x.data.ld(x + k)) * a.sums.ld(sums + k);
    along = warp_sum(along) * rate;
    if (!(rate < a.inverse_eps)) along = a.less_itself ? A(1) : A(0);
    for (int k = lane_id(); k < a.x.width; k += 32) {
      const A unit = to_float(a.x.data.ld(x + k)) * rate;
      a.dx.st(dx + k, from_acc<T>(factor * rate * (a.sums.ld(sums + k) - unit * along)));
    }
  }
}

// Of set s against the other, or of x against itself.
template <class T>
void gradient(const CosineBackward& args, int s, const BatchView& dx, void* stream) {
  using A = Acc<T>;
  using Tile = CosineTile<T>;
  using Layout = GradientLayout<T>;
  const bool within = !args.y.data, square = args.penalty == Penalty::kSquare;
  const int other = within ? 0 : 1 - s;
  const CosineSaved saved(args);
  const Vectors<T> v[2] = {rows_of<T>(args), columns_of<T>(args)};
  const auto numbers = [&](int64_t word) { return Global<const A>{in_words<const A>(args.saved, word)}; };
  const Vectors<T> out = vectors<T>(s ? "dy" : "dx", dx, args.L, v[s].count, args.D);
  const Global<T> to{const_cast<T*>(out.data.p)};
  const Global<const A> dsums{static_cast<const A*>(args.dsums)};
  const A inverse_eps = static_cast<A>(inverse_of(args.eps));
  if (args.penalty == Penalty::kSigned) {
    const int blocks = (v[s].count + kBlockRows - 1) / kBlockRows;
    launch(kName, signed_gradient<T>, args.L * blocks, kThreads, 0, stream,
           SignedKernel<T>{v[s], numbers(saved.rates[s]), numbers(saved.sums[other]), dsums, blocks,
                           within && !args.include_self, within ? A(2) : A(1), inverse_eps, to, out.item,
                           out.row});
    return;
  }
  GradientKernel<T> a{};
  a.x = v[s];
  a.y = v[other];
  a.x_rates = numbers(saved.rates[s]);
  a.y_rates = numbers(saved.rates[other]);
  a.x_sums = numbers(saved.sums[s]);
  a.dsums = dsums;
  a.signs = {in_words<const uint32_t>(args.saved, saved.signs)};
  a.within = within;
  a.turned = s == 1;
  a.include_self = args.include_self;
  a.pieces = v[s].pieces && out.pieces;
  a.planes = args.penalty == Penalty::kAbs ? 2 : 1;
  a.row_tiles = (a.x.count + Tile::kSize - 1) / Tile::kSize;
  a.width_tiles = (a.x.width + Tile::kSize - 1) / Tile::kSize;
  a.factor = A(within ? 2 : 1) * A(square ? 2 : 1);
  a.inverse_eps = inverse_eps;
  a.dx = to;
  a.dx_item = out.item;
  a.dx_row = out.row;
  const int64_t blocks = args.L * a.row_tiles * a.width_tiles;
  const int64_t size = square ? Layout::kSquare : Layout::kSigns;
  launch(kName, square ? gradient_tile<T, false> : gradient_tile<T, true>, blocks, Tile::kThreads,
         size * int64_t(sizeof(T)), stream, a);
}

}  // namespace

int64_t pairwise_cosine_bwd_scratch(const CosineBackward&) { return 0; }

void pairwise_cosine_bwd(const CosineBackward& args, void*, void* stream) {
  if (args.L == 0) return;
  with_type(args, [&](auto number) {
    using T = decltype(number);
    if (args.dx.data) gradient<T>(args, 0, args.dx, stream);
    if (args.dy.data) gradient<T>(args, 1, args.dy, stream);
  });
}

}  // namespace vitdiv::cuda
