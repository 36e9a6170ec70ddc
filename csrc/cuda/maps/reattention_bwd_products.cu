// The last kernel of re-attention's backward: products of maps with rows, a head at a time: dq = scale dZ k, dk
// = scale dZ^T q and dv = Y^T dout. A warp owns 32 (16 in float32 and float64) rows of the result and 64 (32)
// columns. Where the rows of an image are shared out, dk and dv grow in device memory, in order.
#include "reattention_bwd.cuh"

namespace vitdiv::cuda {
namespace {

// Places in shared memory, in elements; two stages.
template <class T>
struct Stage {
  using K = ProductsKernel<T>;
  static constexpr int kDeep = kLine<T>;  // numbers of a sum at a time
  static constexpr int kMapRow = kDeep + Numbers<T>::kPad, kMapRowTransposed = row_stride<T>(K::kRows),
                       kRightRow = K::kWidth + Numbers<T>::kPad;
  static constexpr int kPlain = K::kRows * kMapRow, kTransposed = kDeep * kMapRowTransposed;
  static constexpr int kMap = kPlain > kTransposed ? kPlain : kTransposed;
  static constexpr int kSize = kMap + kDeep * kRightRow;
};

// a [rows, deep] += of one head: L R, where L is the map or its transpose.
template <class T>
KERNEL LAUNCH_BOUNDS(32 * ProductsKernel<T>::kWarps, (sizeof(T) == 2 ? 4 : 1))
    products_tile(ProductsKernel<T> a) {
  using A = Acc<T>;
  using K = ProductsKernel<T>;
  using S = Stage<T>;
  constexpr int row_tiles = K::kRowTiles, warp_rows = 16 * row_tiles, tiles = K::kWidthTiles;
  int block = block_x(), which = 0;
  while (block >= a.products[which].blocks) block -= a.products[which++].blocks;
  const OutProduct<T>& p = a.products[which];
  const bool transposed = p.transposed;
  const int heads = p.heads, width = p.width, column0 = block % p.slices * K::kWidth;
  block /= p.slices;
  const int tile0 = block % p.tiles * K::kRows, head = block / p.tiles % heads,
            image = block / p.tiles / heads;
  const int rows = transposed ? a.space.keys : a.space.rows, deep = transposed ? a.space.rows : a.space.keys;
  const int warp = thread_x() >> 5, row0 = tile0 + warp * warp_rows;
  const Heads<T> right = p.right;
  const int64_t right_at = (a.space.first_image + image) * right.image + head * right.head;
  const Global<T> maps = p.grads ? a.space.grads : a.space.maps;
  const int64_t maps_at = a.space.place(image, p.first_head + head, 0);
  const int right_first = transposed ? a.space.first_row : 0;

  Carver carve;
  const Shared<T> memory = carve.take<T>(2 * S::kSize);
  const auto fetch = [&](int k0) {
    if (k0 < deep) {
      const int at = k0 / S::kDeep % 2 * S::kSize;
      const int map_rows = transposed ? S::kDeep : K::kRows,
                pieces = (transposed ? K::kRows : S::kDeep) / kPiece<T>;
      const int stride = transposed ? S::kMapRowTransposed : S::kMapRow;
      const int i0 = transposed ? k0 : tile0, j0 = transposed ? tile0 : k0;
      ROLLED_FOR (int c = thread_x(); c < map_rows * pieces; c += threads()) {
        const int i = c / pieces, x = c % pieces * kPiece<T>;  // pieces: a power of two
        copy16_async(memory, at + i * stride + x, Global<const T>{maps.p},
                     maps_at + int64_t(i0 + i) * a.space.row + j0 + x,
                     i0 + i < a.space.rows && j0 + x < a.space.row);
      }
      fetch_rows(memory.part(at + S::kMap, S::kDeep * S::kRightRow), S::kRightRow, right, right_at,
                 right_first + k0, S::kDeep, right_first + deep, column0, K::kWidth, width);
    }
    copy_commit();
  };
  A acc[row_tiles][tiles][2][4] = {};
  const auto multiply = [&](int at, int depth, auto is_transposed) {
    constexpr bool flipped = decltype(is_transposed)::value;
    ROLLED_FOR (int k0 = 0; k0 < depth; k0 += kDepth<T>) {
      FragmentA<T> left[row_tiles];
      UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
        load_a<flipped>(left[r], memory, [&](int i, int k) {
          const int row = warp * warp_rows + 16 * r + i;
          return at + (flipped ? (k0 + k) * S::kMapRowTransposed + row : row * S::kMapRow + k0 + k);
        });
      UNROLLED_FOR (int x = 0; x < tiles; ++x) {
        if (column0 + 16 * x >= width) continue;
        FragmentB<T> b[2];
        load_b<true>(b, memory, [&](int column, int k) {
          return at + S::kMap + (k0 + k) * S::kRightRow + 16 * x + column;
        });
        UNROLLED_FOR (int r = 0; r < row_tiles; ++r) multiply_add<T>(acc[r][x], left[r], b);
      }
    }
  };
  fetch(0);
  for (int k0 = 0; k0 < deep; k0 += S::kDeep) {
    copy_wait<0>();
    sync_block();
    fetch(k0 + S::kDeep);
    if (row0 >= rows) continue;
    const int at = k0 / S::kDeep % 2 * S::kSize,
              depth = padded_width(deep - k0 < S::kDeep ? deep - k0 : S::kDeep);
    if (transposed)
      multiply(at, depth, std::true_type());
    else
      multiply(at, depth, std::false_type());
  }
  sync_block();  // the stages' place becomes that of the result
  if (row0 >= rows) return;

  A factor = p.factor;
  if constexpr (kBounded<T>)
    if (p.grads) factor /= a.sizes.ld(image);
  const Shared<T> stage = memory.part(warp * warp_rows * S::kRightRow, warp_rows * S::kRightRow);
  UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
    UNROLLED_FOR (int x = 0; x < tiles; ++x)
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        UNROLLED_FOR (int half = 0; half < 2; ++half) {
          const int row = 16 * r + tile_row(2 * half), column = 16 * x + 8 * j + tile_col(0);
          A pair[2] = {acc[r][x][j][2 * half] * factor, acc[r][x][j][2 * half + 1] * factor};
          if (p.sums.p && row0 + row < rows && column0 + column < width) {
            // a lane always comes back to the same sums
            const int64_t at = ((int64_t(head) * rows + row0 + row) * padded_width(width)) + column0 + column;
            UNROLLED_FOR (int e = 0; e < 2; ++e) {
              if (!a.first) pair[e] += p.sums.ld(at + e);
              if (!a.last) p.sums.st(at + e, pair[e]);
            }
          }
          store2(stage, row * S::kRightRow + column, pair[0], pair[1]);
        }
  if (p.sums.p && !a.last) return;
  sync_warp();
  const int64_t out = (a.space.first_image + image) * p.out_image + head * p.out_head +
                      (transposed ? 0 : a.space.first_row) * p.out_row + column0;
  const int columns = width - column0 < K::kWidth ? width - column0 : K::kWidth;
  const int last_row = rows - row0 < warp_rows ? rows - row0 : warp_rows;
  if (p.pieces) {
    ROLLED_FOR (int r = lane_id() >> 3; r < last_row; r += 4)
      ROLLED_FOR (int x = (lane_id() & 7) * kPiece<T>; x < columns; x += 8 * kPiece<T>)
        p.out.template st<uint4>(out + (row0 + r) * p.out_row + x,
                                 stage.template ld<uint4>(r * S::kRightRow + x));
  } else {
    ROLLED_FOR (int r = lane_id() >> 3; r < last_row; r += 4)
      ROLLED_FOR (int x = lane_id() & 7; x < columns; x += 8)
        p.out.st(out + (row0 + r) * p.out_row + x, stage.ld(r * S::kRightRow + x));
  }
}

}  // namespace

template <class T>
void launch_products(const ProductsKernel<T>& a, int64_t blocks, void* stream) {
  launch("reattention_bwd", products_tile<T>, blocks, 32 * ProductsKernel<T>::kWarps,
         2 * Stage<T>::kSize * int64_t(sizeof(T)), stream, a);
}
template void launch_products(const ProductsKernel<half_t>&, int64_t, void*);
template void launch_products(const ProductsKernel<bf16_t>&, int64_t, void*);
template void launch_products(const ProductsKernel<float>&, int64_t, void*);
template void launch_products(const ProductsKernel<double>&, int64_t, void*);

}  // namespace vitdiv::cuda
