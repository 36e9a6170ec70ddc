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
  // rows of the result, and how many products are summed
  const int rows = transposed ? a.space.keys : a.space.rows, deep = transposed ? a.space.rows : a.space.keys;
  const int warp = thread_x() >> 5, row0 = tile0 + warp * warp_rows;
  const Heads<T> right = p.right;
  const int64_t right_at = (a.space.first_image + image) * right.image + head * right.head;
  const Global<T> maps = p.grads ? a.space.grads : a.space.maps;
  const int64_t maps_at = a.space.place(image, p.first_head + head, 0);
  const int right_first = transposed ? a.space.first_row : 0;

  Carver carve;
  const Shared<T> memory = carve.take<T>(2 * S::kSize);
  const int tiles_there = width - column0 > 16 * tiles / 2 ? tiles : tiles / 2;
  const auto fetch_maps = [&](int at, int i0, int j0, auto rows_of_maps, auto columns) {
    constexpr int count = decltype(rows_of_maps)::value, pieces = decltype(columns)::value / kPiece<T>,
                  stride = row_stride<T>(decltype(columns)::value), step = 32 * K::kWarps / pieces;
    const int i = thread_x() / pieces, x = thread_x() % pieces * kPiece<T>;
    const int left_rows = j0 + x < a.space.row ? a.space.rows - i0 - i : 0;
    int64_t from = maps_at + int64_t(i0 + i) * a.space.row + j0 + x;
    UNROLLED_FOR (int r = 0; r < count; r += step) {
      copy16_async(memory, at + (i + r) * stride + x, Global<const T>{maps.p}, from, r < left_rows);
      from += step * a.space.row;
    }
  };
  using Rows = std::integral_constant<int, K::kRows>;
  using Deep = std::integral_constant<int, S::kDeep>;
  const auto fetch = [&](int k0) {
    if (k0 < deep) {
      const int at = k0 / S::kDeep % 2 * S::kSize;
      if (transposed)
        fetch_maps(at, k0, tile0, Deep(), Rows());
      else
        fetch_maps(at, tile0, k0, Rows(), Deep());
      fetch_rows(memory.part(at + S::kMap, S::kDeep * S::kRightRow), S::kRightRow, right, right_at,
                 right_first + k0, S::kDeep, right_first + deep, column0, 16 * tiles_there, width);
    }
    copy_commit();
  };
  A acc[row_tiles][tiles][2][4] = {};
  const auto step = [&](int at, int k0, auto is_transposed, auto columns) {
    constexpr bool flipped = decltype(is_transposed)::value;
    FragmentA<T> left[row_tiles];
    UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
      load_a<flipped>(left[r], memory, [&](int i, int k) {
        const int row = warp * warp_rows + i;
        return at + (flipped ? k * S::kMapRowTransposed + row : row * S::kMapRow + k) +
               (flipped ? k0 * S::kMapRowTransposed + 16 * r : 16 * r * S::kMapRow + k0);
      });
    UNROLLED_FOR (int x = 0; x < decltype(columns)::value; ++x) {
      FragmentB<T> b[2];
      load_b<true>(b, memory, [&](int column, int k) {
        return at + S::kMap + k * S::kRightRow + column + (k0 * S::kRightRow + 16 * x);
      });
      UNROLLED_FOR (int r = 0; r < row_tiles; ++r) multiply_add<T>(acc[r][x], left[r], b);
    }
  };
  const auto multiply = [&](int at, int depth, auto is_transposed, auto columns) {
    if constexpr (sizeof(T) == 2) {
      UNROLLED_FOR (int k0 = 0; k0 < S::kDeep; k0 += kDepth<T>)
        if (k0 < depth) step(at, k0, is_transposed, columns);
    } else {
      ROLLED_FOR (int k0 = 0; k0 < depth; k0 += kDepth<T>) step(at, k0, is_transposed, columns);
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
    const auto of_width = [&](auto is_transposed) {
      if (tiles_there == tiles)
        multiply(at, depth, is_transposed, std::integral_constant<int, tiles>());
      else
        multiply(at, depth, is_transposed, std::integral_constant<int, tiles / 2>());
    };
    if (transposed)
      of_width(std::true_type());
    else
      of_width(std::false_type());
  }
  sync_block();  // the stages' place becomes that of the result
  if (row0 >= rows) return;

  A factor = p.factor;
  if constexpr (kBounded<T>)
    if (p.grads) factor *= a.units.ld(image);
  const Shared<T> stage = memory.part(warp * warp_rows * S::kRightRow, warp_rows * S::kRightRow);
  UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
    UNROLLED_FOR (int x = 0; x < tiles; ++x)
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        UNROLLED_FOR (int e = 0; e < 4; ++e) acc[r][x][j][e] *= factor;
  if (p.sums.p) {  // a lane always comes back to the same sums
    UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
      UNROLLED_FOR (int x = 0; x < tiles; ++x)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 0; e < 4; ++e) {
            const int row = row0 + 16 * r + tile_row(e), column = column0 + 16 * x + 8 * j + tile_col(e);
            if (row >= rows || column >= width) continue;
            const int64_t at = (int64_t(head) * rows + row) * width + column;
            if (!a.first) acc[r][x][j][e] += p.sums.ld(at);
            if (!a.last) p.sums.st(at, acc[r][x][j][e]);
          }
    if (!a.last) return;
  }
  UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
    UNROLLED_FOR (int x = 0; x < tiles; ++x)
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        UNROLLED_FOR (int i = 0; i < 2; ++i)
          store2(stage,
                 tile_row(0) * S::kRightRow + tile_col(0) + (16 * r + 8 * i) * S::kRightRow + 16 * x + 8 * j,
                 acc[r][x][j][2 * i], acc[r][x][j][2 * i + 1]);
  sync_warp();
  const int64_t out = (a.space.first_image + image) * p.out_image + head * p.out_head +
                      (transposed ? 0 : a.space.first_row) * p.out_row + column0;
  const int columns = width - column0 < K::kWidth ? width - column0 : K::kWidth;
  const int r0 = lane_id() >> 3, last_row = rows - row0 < warp_rows ? rows - row0 : warp_rows;
  if (p.pieces) {
    for (int x = (lane_id() & 7) * kPiece<T>; x < columns; x += 8 * kPiece<T>) {
      int64_t at = out + (row0 + r0) * p.out_row + x;
      UNROLLED_FOR (int r = 0; r < warp_rows; r += 4) {
        if (r0 + r < last_row)
          p.out.template st<uint4>(at, stage.template ld<uint4>((r0 + r) * S::kRightRow + x));
        at += 4 * p.out_row;
      }
    }
  } else {
    ROLLED_FOR (int r = r0; r < last_row; r += 4)
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
