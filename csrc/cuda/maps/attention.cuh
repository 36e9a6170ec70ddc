// What kernels over attention maps share: rows of queries and keys on their way into shared memory, and the
// products of a tile of query rows with a stream of keys.
#pragma once

#include <cmath>

#include "../../arguments/views.h"
#include "../core/mma.cuh"
#include "../core/reduce.cuh"

namespace vitdiv::cuda {

inline constexpr double kLog2e = 1.4426950408889634;

// 16-bit maps are float16 times 2^14: A - 1/M of a collapsed model may be as small as 1e-9.
template <class T>
struct MapNumbers {
  using Type = T;
  static constexpr float kScale = 1;
};
template <>
struct MapNumbers<half_t> {
  using Type = half_t;
  static constexpr float kScale = 16384;
};
template <>
struct MapNumbers<bf16_t> : MapNumbers<half_t> {};
template <class T>
using Map = typename MapNumbers<T>::Type;

// [B, H, rows, width] in device memory, in elements; the last stride is 1.
template <class T>
struct Heads {
  Global<const T> data;
  int64_t image, head, row;
  int pieces;  // each row is whole and aligned pieces of 16 bytes
};

template <class T>
bool in_pieces(const HeadsView& view, int64_t width) {
  constexpr int64_t piece = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && width % piece == 0 &&
         view.stride_b % piece == 0 && view.stride_h % piece == 0 && view.stride_n % piece == 0;
}
template <class T>
Heads<T> heads_view(const HeadsView& view, int64_t width) {
  return {{static_cast<const T*>(view.data)},
          view.stride_b,
          view.stride_h,
          view.stride_n,
          in_pieces<T>(view, width)};
}

// Rows first .. first + 15 of one head into a tile of `padded` columns, zeros outside of [0, end) x [0,
// width). Eight lanes share a row: they copy 128 bytes of it at a time, a whole line of L2, and meet eight
// different groups of banks.
template <class T>
DEVICE void fetch16(Shared<T> tile, int stride, const Heads<T>& from, int64_t head, int first, int end,
                    int width, int padded) {
  constexpr int piece = 16 / sizeof(T);
  if (from.pieces) {
    const int r = lane_id() >> 3;
    const int64_t row = head + (first + r) * from.row;
    ROLLED_FOR (int x = (lane_id() & 7) * piece; x < padded; x += 8 * piece)
      UNROLLED_FOR (int i = 0; i < 16; i += 4)
        copy16_async(tile, (r + i) * stride + x, from.data, row + i * from.row + x,
                     first + r + i < end && x < width);
  } else {
    const int r = lane_id() & 15;
    const int64_t row = head + (first + r) * from.row;
    ROLLED_FOR (int x = lane_id() >> 4; x < padded; x += 2)
      tile.st(r * stride + x, first + r < end && x < width ? from.data.ld(row + x) : T{});
  }
}

// A warp's 16 * ROW_TILES query rows in shared memory, the left factor of products with keys. With HELD the
// first 64 columns are held in registers where they have 16 bits.
template <class T, int ROW_TILES, bool HELD>
struct Queries {
  static constexpr int kHeld = HELD && sizeof(T) == 2 ? 4 : 0;
  FragmentA<T> held[ROW_TILES][kHeld > 0 ? kHeld : 1];

  DEVICE static FragmentA<T> fragment(Shared<T> rows, int stride, int r, int x) {
    FragmentA<T> a;
    load_a(a, rows, [&](int row, int k) { return (16 * r + row) * stride + x + k; });
    return a;
  }
  DEVICE void hold(Shared<T> rows, int stride, int padded) {
    UNROLLED_FOR (int x = 0; x < kHeld; ++x)
      if (x * kDepth<T> < padded)
        UNROLLED_FOR (int r = 0; r < ROW_TILES; ++r) held[r][x] = fragment(rows, stride, r, x * kDepth<T>);
  }
  // acc[r][j][e] += q . k at row 16 r + tile_row(e), key 8 j + tile_col(e), of 16 keys whose rows begin at
  // keys[first]
  DEVICE void multiply(Acc<T> (&acc)[ROW_TILES][2][4], Shared<T> rows, Shared<T> keys, int first, int stride,
                       int padded) const {
    const auto step = [&](int x, auto left) {
      FragmentB<T> b[2];
      load_b(b, keys, [&](int key, int i) { return first + key * stride + x + i; });
      UNROLLED_FOR (int r = 0; r < ROW_TILES; ++r) multiply_add<T>(acc[r], left(r), b);
    };
    UNROLLED_FOR (int x = 0; x < kHeld; ++x)
      if (x * kDepth<T> < padded) step(x * kDepth<T>, [&](int r) { return held[r][x]; });
    for (int x = kHeld * kDepth<T>; x < padded; x += kDepth<T>)
      step(x, [&](int r) { return fragment(rows, stride, r, x); });
  }
};

// One head's tile of 16 * ROW_TILES query rows and the ring through which its keys stream, 16 at a time: a
// warp's own memory, so that warps need no barrier between them.
template <class T, int ROW_TILES, bool HELD = false>
struct Scores {
  static constexpr int kStages = 2;  // more would leave less room for maps
  HOST_DEVICE static constexpr int size(int stride) { return 16 * (ROW_TILES + kStages) * stride; }

  Shared<T> memory;
  int stride, width, padded;  // of a row in shared memory; head width; head width with zeros

  DEVICE int ring(int t) const { return 16 * (ROW_TILES + t % kStages) * stride; }
  DEVICE Shared<T> ring_tile(int t) const { return memory.part(ring(t), 16 * stride); }

  // Begins to load the query rows; they travel with the first keys.
  DEVICE void fetch_queries(const Heads<T>& q, int64_t head, int first, int end) const {
    sync_warp();  // the rows of another head may still be in use
    UNROLLED_FOR (int r = 0; r < ROW_TILES; ++r)
      fetch16(memory.part(16 * r * stride, 16 * stride), stride, q, head, first + 16 * r, end, width, padded);
  }

  // use(t, place) for tiles t of 16 keys, which stand in the ring from `place` on.
  template <class Use>
  DEVICE void for_each_keys(const Heads<T>& k, int64_t head, int first_tile, int end_tile, int end_key,
                            Use use) const {
    sync_warp();  // the ring may still be in use
    // at first tiles are only fetched, kStages - 1 ahead
    ROLLED_FOR (int t = first_tile - kStages + 1; t < end_tile; ++t) {
      if (t >= first_tile) {
        copy_wait<kStages - 2>();
        sync_warp();
      }
      const int ahead = t + kStages - 1;
      if (ahead < end_tile) fetch16(ring_tile(ahead), stride, k, head, 16 * ahead, end_key, width, padded);
      copy_commit();
      if (t >= first_tile) use(t, ring(t));
    }  // only empty groups are left to wait for
  }

  // use(t, acc): acc[r][j][e] = q . k at row 16 r + tile_row(e), key 16 t + 8 j + tile_col(e).
  template <class Use>
  DEVICE void for_each_tile(const Heads<T>& k, int64_t head, int first_tile, int end_tile, int end_key,
                            Use use) const {
    Queries<T, ROW_TILES, HELD> queries;
    for_each_keys(k, head, first_tile, end_tile, end_key, [&](int t, int keys) {
      if (t == first_tile) queries.hold(memory, stride, padded);
      Acc<T> acc[ROW_TILES][2][4] = {};
      queries.multiply(acc, memory, memory, keys, stride, padded);
      use(t, acc);
    });
  }
};

// The largest logit of each row and the sum of exponentials, gathered while keys stream by. Each lane has its
// own columns; finish() unites the four lanes of a row.
template <class T, int ROW_TILES>
struct RowStatistics {
  Acc<T> row_max[ROW_TILES][2], sum[ROW_TILES][2];

  DEVICE RowStatistics() {
    UNROLLED_FOR (int r = 0; r < ROW_TILES; ++r)
      UNROLLED_FOR (int i = 0; i < 2; ++i) {
        row_max[r][i] = Acc<T>(-1e38);  // finite: no inf - inf
        sum[r][i] = 0;
      }
  }
  // logits in units of ln 2; -inf for keys that are not there
  DEVICE void add(const Acc<T> (&logits)[ROW_TILES][2][4]) {
    UNROLLED_FOR (int r = 0; r < ROW_TILES; ++r)
      UNROLLED_FOR (int i = 0; i < 2; ++i) {
        const auto& x = logits[r];
        const Acc<T> before = row_max[r][i];
        row_max[r][i] = larger(larger(before, larger(x[0][2 * i], x[0][2 * i + 1])),
                               larger(x[1][2 * i], x[1][2 * i + 1]));
        sum[r][i] *= fast_exp2(before - row_max[r][i]);
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 0; e < 2; ++e) sum[r][i] += fast_exp2(x[j][2 * i + e] - row_max[r][i]);
      }
  }
  DEVICE void finish() {
    UNROLLED_FOR (int r = 0; r < ROW_TILES; ++r)
      UNROLLED_FOR (int i = 0; i < 2; ++i) {
        const Acc<T> own = row_max[r][i];
        row_max[r][i] = quad_max(own);
        sum[r][i] = quad_sum(sum[r][i] * fast_exp2(own - row_max[r][i]));
      }
  }
};

}  // namespace vitdiv::cuda
