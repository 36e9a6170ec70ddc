// What the backward of abs, relu and square is made of: unit vectors on their way into shared memory, and slopes from signs.
#pragma once

#include <algorithm>

#include "pairwise_cosine.cuh"

namespace vitdiv::cuda {

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

// A block's tile of the gradient, kRows vectors by kWidth features, and places in shared memory. Signs cost next to nothing
// to read, so that with them a tall tile, whose unit vectors each block reads once for more rows, is the cheaper one.
template <class T, bool SIGNS>
struct GradientLayout {
  using Tile = CosineTile<T>;
  static constexpr int kRows = SIGNS ? Tile::kThreads : Tile::kSize;
  static constexpr int kWidth = SIGNS ? 32 * Tile::kGroups : Tile::kSize;
  // 32 other vectors as the right factor; columns of a fragment lie in different banks
  static constexpr int kUnitStride = kWidth + (sizeof(T) == 8 ? 4 : 8), kUnit = 32 * kUnitStride;
  // the left factor of square
  static constexpr int kSlopeStride = row_stride<T>(Tile::kSize), kSlopes = Tile::kSize * kSlopeStride;
  // 32 x 16 of the gradient of unit vectors, on their way out
  static constexpr int kTurnedStride = 16 + Numbers<Acc<T>>::kPad, kTurned = 32 * kTurnedStride;
  static constexpr int kAllTurned = Tile::kThreads / 32 * kTurned * int(sizeof(Acc<T>) / sizeof(T));
  // of square first the products' ring, then in the same place slopes and unit vectors, at last the gradient
  static constexpr int kSize =
      std::max(SIGNS ? 2 * kUnit : std::max(2 * Tile::kStage, kSlopes + kUnit), kAllTurned);
  static constexpr int kPieces = 32 * kWidth / kPiece<T> / Tile::kThreads;  // of a thread
};

// The unit vectors' way into shared memory: a piece waits in registers while the piece before is in use.
template <class T, class Layout>
struct UnitVectors {
  using Tile = CosineTile<T>;
  const Vectors<T>& y;
  Global<const Acc<T>> rates;
  int64_t item, first_rate;
  int k0;  // the first feature
  uint4 bits[Layout::kPieces];
  Acc<T> rate[Layout::kPieces];

  DEVICE static int row(int p) { return (p * Tile::kThreads + thread_x()) / (Layout::kWidth / kPiece<T>); }
  DEVICE static int column(int p) {
    return (p * Tile::kThreads + thread_x()) % (Layout::kWidth / kPiece<T>)*kPiece<T>;
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
      ROLLED_FOR (int p = thread_x(); p < 32 * Layout::kWidth; p += Tile::kThreads) {
        const int j = p / Layout::kWidth, k = p % Layout::kWidth;
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

}  // namespace vitdiv::cuda
