// The first kernel of re-attention's backward: products of two sets of rows of a head, 128 of the first (64 in
// float32, 32 in float64) with all of the second, into the workspace: A - mean, or logits that are to be mixed,
// and dY. A warp owns 32 or 16 rows; what it makes leaves in rows of 128 bytes.
#include "reattention_bwd.cuh"

namespace vitdiv::cuda {
namespace {

template <class T>
KERNEL LAUNCH_BOUNDS(32 * MapsKernel<T>::kWarps, (sizeof(T) == 2 ? 4 : 1)) maps_tile(MapsKernel<T> a) {
  using A = Acc<T>;
  using K = MapsKernel<T>;
  constexpr int row_tiles = K::kRowTiles, line = kLine<T>, stage_stride = maps_stage_row<T>;
  constexpr int warp_rows = 16 * row_tiles;
  const int rows = warp_rows * (threads() >> 5);
  int block = block_x(), which = 0;
  while (block >= a.products[which].blocks) block -= a.products[which++].blocks;
  const int heads = a.products[which].heads, width = a.products[which].width, padded = padded_width(width);
  const int tile = block % a.tiles, head = block / a.tiles % heads, image = block / a.tiles / heads;
  const int warp = thread_x() >> 5, row0 = tile * rows + warp * warp_rows, keys = a.space.keys;
  const Heads<T>&left = a.products[which].left, &right = a.products[which].right;
  const int64_t left_at = (a.space.first_image + image) * left.image + head * left.head,
                right_at = (a.space.first_image + image) * right.image + head * right.head;
  const A scale = a.products[which].scale;
  const bool to_grads = a.products[which].grads, is_maps = a.products[which].rows.p != nullptr;
  const bool two_planes = kLogitPlanes<T> == 2 && a.mixed_logits && !to_grads;

  Carver carve;
  const Shared<T> all_left = carve.take<T>(rows * a.stride), ring = carve.take<T>(2 * line * a.stride);
  const Shared<T> own = all_left.part(warp * warp_rows * a.stride, warp_rows * a.stride);
  const Shared<T> stages = carve.take<T>((a.mixed_logits ? kLogitPlanes<T> : 1) * rows * stage_stride);
  const Shared<T> stage = stages.part(warp * warp_rows * stage_stride, warp_rows * stage_stride);
  const Shared<T> low =
      stages.part(((two_planes ? rows : 0) + warp * warp_rows) * stage_stride, warp_rows * stage_stride);
  const auto fetch = [&](int key0) {
    if (key0 < keys)
      fetch_rows(ring.part(key0 / line % 2 * line * a.stride, line * a.stride), a.stride, right, right_at,
                 key0, line, keys, 0, padded, width);
    copy_commit();
  };
  fetch_rows(all_left, a.stride, left, left_at, a.space.first_row + tile * rows, rows,
             a.space.first_row + a.space.rows, 0, padded, width);
  fetch(0);

  A row_max[row_tiles][2] = {}, row_scale[row_tiles][2] = {};
  if (is_maps) {
    const Global<const A> rows = a.products[which].rows;
    UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
      UNROLLED_FOR (int i = 0; i < 2; ++i) {
        const int row = row0 + 16 * r + tile_row(2 * i);
        if (row >= a.space.rows) continue;
        const int64_t at =
            (int64_t(a.space.first_image + image) * heads + head) * a.queries + a.space.first_row + row;
        row_max[r][i] = rows.ld(at);
        row_scale[r][i] = rows.ld(at + a.products[which].field) * A(kMapUnit<T> / MapNumbers<T>::kScale);
      }
  }
  Queries<T, row_tiles, true> queries;
  A largest = 0;
  for (int key0 = 0; key0 < keys; key0 += line) {
    copy_wait<0>();
    sync_block();
    if (key0 == 0) queries.hold(own, a.stride, padded);
    fetch(key0 + line);
    if (row0 >= a.space.rows) continue;
    const int columns = a.space.row - key0 < line ? a.space.row - key0 : line;
    ROLLED_FOR (int x = 0; x < columns; x += 16) {
      A s[row_tiles][2][4] = {};
      queries.multiply(s, own, ring, (key0 / line % 2 * line + x) * a.stride, a.stride, padded);
      if (is_maps) {
        UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            UNROLLED_FOR (int e = 0; e < 4; ++e)
              s[r][j][e] = fast_exp2(s[r][j][e] * scale - row_max[r][e >> 1]) * row_scale[r][e >> 1] - a.mean;
        if (key0 + x + 16 > keys) {
          UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
            UNROLLED_FOR (int j = 0; j < 2; ++j)
              UNROLLED_FOR (int e = 0; e < 4; ++e)
                if (key0 + x + 8 * j + tile_col(e) >= keys) s[r][j][e] = 0;
        }
      } else if (!to_grads) {
        UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            UNROLLED_FOR (int e = 0; e < 4; ++e) s[r][j][e] *= scale;
      }
      if constexpr (kBounded<T>) {
        if (to_grads) {
          UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
            UNROLLED_FOR (int j = 0; j < 2; ++j)
              UNROLLED_FOR (int e = 0; e < 4; ++e) largest = larger(largest, fabsf(s[r][j][e]));
        }
      }
      const int stage_at = tile_row(0) * stage_stride + tile_col(0) + x;
      UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int i = 0; i < 2; ++i)
            store2(stage, stage_at + (16 * r + 8 * i) * stage_stride + 8 * j, s[r][j][2 * i],
                   s[r][j][2 * i + 1]);
      if constexpr (kLogitPlanes<T> == 2)
        if (two_planes) {
          UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
            UNROLLED_FOR (int j = 0; j < 2; ++j)
              UNROLLED_FOR (int i = 0; i < 2; ++i) {
                const A first = s[r][j][2 * i], second = s[r][j][2 * i + 1];
                store2(low, stage_at + (16 * r + 8 * i) * stage_stride + 8 * j,
                       first - to_float(from_float<T>(first)), second - to_float(from_float<T>(second)));
              }
        }
    }
    sync_warp();
    const int x = (lane_id() & 7) * kPiece<T>, first_row = lane_id() >> 3;
    const int64_t out =
        a.space.place(image, a.products[which].first_head + head, row0 + first_row) + key0 + x;
    const int left_rows = x < columns ? a.space.rows - row0 - first_row : 0;
    const auto leave = [&](Shared<T> from, Global<T> to) {
      int64_t at = out;
      UNROLLED_FOR (int r = 0; r < warp_rows; r += 4) {
        if (r < left_rows)
          to.template st<uint4>(at, from.template ld<uint4>((first_row + r) * stage_stride + x));
        at += 4 * a.space.row;
      }
    };
    leave(stage, to_grads ? a.space.grads : a.space.maps);
    if (two_planes) leave(low, a.space.low);
    sync_warp();
  }
  if constexpr (kBounded<T>)
    if (to_grads) {
      largest = warp_max(largest);
      if (lane_id() == 0)
        a.bounds.st(((int64_t(image) * heads + head) * a.tiles + tile) * (threads() >> 5) + warp, largest);
    }
}

}  // namespace

template <class T>
void launch_maps(const MapsKernel<T>& a, int warps, int64_t blocks, void* stream) {
  launch("reattention_bwd", maps_tile<T>, blocks, 32 * warps, a.shared_bytes(warps), stream, a);
}
template void launch_maps(const MapsKernel<half_t>&, int, int64_t, void*);
template void launch_maps(const MapsKernel<bf16_t>&, int, int64_t, void*);
template void launch_maps(const MapsKernel<float>&, int, int64_t, void*);
template void launch_maps(const MapsKernel<double>&, int, int64_t, void*);

}  // namespace vitdiv::cuda
