// Of each query row and head the largest logit (in units of ln 2) and the inverse of its sum of exponentials
// times MapNumbers::kScale, by a kernel that reads the keys once for many query rows.
#pragma once

#include <stdexcept>
#include <string>

#include "attention.cuh"

namespace vitdiv::cuda {

template <class T>
struct SoftmaxRows {
  static constexpr int kRowTiles = sizeof(T) == 2 ? 2 : 1;
  static constexpr int kWarps = sizeof(T) == 8 ? 2 : 4;
  static constexpr int kRows = 16 * kRowTiles * kWarps;                // of a block
  static constexpr int kKeys = sizeof(T) == 2 ? 64 : 128 / sizeof(T);  // that are loaded at a time

  Heads<T> q;  // [images, heads, n, width]
  Heads<T> k;  // [images, heads, m, width]
  int heads;
  int n;  // queries
  int m;  // keys
  int width;
  int tiles;            // of the queries of a head
  Acc<T> scale;         // times log2(e)
  int64_t field;        // images * heads * n
  Global<Acc<T>> rows;  // [2, images, heads, n]
};

// WIDTH: of a head, or 0 for any.
// rows[0, i] = max_j z[i, j], z = scale q k^T log2(e); rows[1, i] = kScale / sum_j 2^(z[i, j] - rows[0, i]).
template <class T, int WIDTH>
KERNEL LAUNCH_BOUNDS(32 * SoftmaxRows<T>::kWarps, WIDTH > 0 ? 4 : 1) softmax_rows(SoftmaxRows<T> a) {
  using S = SoftmaxRows<T>;
  constexpr int row_tiles = S::kRowTiles;
  const int warp = thread_x() >> 5, head = block_x() / a.tiles % a.heads,
            image = block_x() / a.tiles / a.heads;
  const int row0 = block_x() % a.tiles * S::kRows + warp * 16 * row_tiles;
  const int width = WIDTH > 0 ? WIDTH : a.width, padded = padded_width(width), stride = row_stride<T>(width);
  const int64_t q = image * a.q.image + head * a.q.head, k = image * a.k.image + head * a.k.head;
  Carver carve;
  const Shared<T> all_queries = carve.take<T>(S::kRows * stride);
  const Shared<T> own = all_queries.part(16 * row_tiles * warp * stride, 16 * row_tiles * stride);
  const Shared<T> keys = carve.take<T>(2 * S::kKeys * stride);
  const auto fetch = [&](int key0) {
    const int to = key0 / S::kKeys % 2 * S::kKeys;
    for (int x = 16 * warp; x < S::kKeys && key0 + x < a.m; x += 16 * S::kWarps)
      fetch16(keys.part((to + x) * stride, 16 * stride), stride, a.k, k, key0 + x, a.m, width, padded);
    copy_commit();
  };
  UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
    fetch16(own.part(16 * r * stride, 16 * stride), stride, a.q, q, row0 + 16 * r, a.n, width, padded);
  fetch(0);
  Queries<T, row_tiles, true> queries;
  RowStatistics<T, row_tiles> statistics;
  for (int key0 = 0; key0 < a.m; key0 += S::kKeys) {
    copy_wait<0>();
    sync_block();
    if (key0 == 0) queries.hold(own, stride, padded);
    fetch(key0 + S::kKeys);
    if (row0 >= a.n) continue;
    const int first = key0 / S::kKeys % 2 * S::kKeys;
    ROLLED_FOR (int x = 0; x < S::kKeys && key0 + x < a.m; x += 16) {
      Acc<T> s[row_tiles][2][4] = {};
      queries.multiply(s, own, keys, (first + x) * stride, stride, padded);
      UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 0; e < 4; ++e) s[r][j][e] *= a.scale;
      if (key0 + x + 16 > a.m)
        UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            UNROLLED_FOR (int e = 0; e < 4; ++e)
              if (key0 + x + 8 * j + tile_col(e) >= a.m) s[r][j][e] = -INFINITY;
      statistics.add(s);
    }
  }
  statistics.finish();
  UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const int row = row0 + 16 * r + tile_row(2 * i);
      if ((lane_id() & 3) != 0 || row >= a.n) continue;
      const int64_t to = (int64_t(image) * a.heads + head) * a.n + row;
      a.rows.st(to, statistics.row_max[r][i]);
      a.rows.st(to + a.field, MapNumbers<T>::kScale / statistics.sum[r][i]);
    }
}

template <class T>
void launch_softmax_rows(const char* operation, const ReattentionArgs& args, Acc<T>* rows, void* stream) {
  using S = SoftmaxRows<T>;
  S a{};
  a.q = heads_view<T>(args.q, args.d);
  a.k = heads_view<T>(args.k, args.d);
  a.heads = static_cast<int>(args.H);
  a.n = static_cast<int>(args.N);
  a.m = static_cast<int>(args.M);
  a.width = static_cast<int>(args.d);
  const int stride = row_stride<T>(a.width);
  a.tiles = (a.n + S::kRows - 1) / S::kRows;
  a.scale = static_cast<Acc<T>>(args.scale * kLog2e);
  a.field = args.B * args.H * args.N;
  a.rows = {rows};
  const int64_t bytes = (S::kRows + 2 * S::kKeys) * stride * int64_t(sizeof(T)),
                limit = shared_memory_limit(operation);
  if (bytes > limit)
    throw std::invalid_argument("reattention: heads of width " + std::to_string(a.width) +
                                " do not fit the shared memory of this GPU, " + std::to_string(limit) +
                                " bytes");
  auto* kernel = softmax_rows<T, 0>;
  if constexpr (sizeof(T) == 2) {
    if (a.width == 32) kernel = softmax_rows<T, 32>;
    if (a.width == 48) kernel = softmax_rows<T, 48>;
    if (a.width == 64) kernel = softmax_rows<T, 64>;
  }
  launch(operation, kernel, args.B * args.H * a.tiles, 32 * S::kWarps, bytes, stream, a);
}

}  // namespace vitdiv::cuda
