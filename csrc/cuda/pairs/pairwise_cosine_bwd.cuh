// The slopes of abs and relu, from the forward's signs.
#pragma once

#include "pairwise_gradient.cuh"

namespace vitdiv::cuda {

template <class T>
struct SignedGradient : Gradient<T> {
  Vectors<T> y;                          // [items, M, D]
  Global<const Acc<T>> y_inverse_norms;  // [items, M]
  Global<const Acc<T>> x_sums;           // [items, N]: of the penalties of a vector
  Global<const Acc<T>> dsums;            // [items]
  Global<const uint32_t> signs;  // [items, N, planes, ceil(M / 32)]; turned [items, M, planes, ceil(N / 32)]
  bool within;                   // y is x
  bool turned;                   // signs stand in rows of y
  int planes;                    // 2 of abs, 1 of relu
  Acc<T> factor;
};

template <class T>
struct SignLayout : TallLayout<T> {
  static constexpr int kMemory = std::max(2 * TallLayout<T>::kUnit, TallLayout<T>::kAllTurned);
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

// Slopes, 1, -1 or 0, as a left factor: 16 rows, of which the lane has the words of two, by kDepth columns
// from `column`.
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
DEVICE SignWords sign_words(const SignedGradient<T>& a, int64_t item, int row, int first) {
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
