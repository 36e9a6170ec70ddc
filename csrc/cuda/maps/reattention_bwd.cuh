// The backward of re-attention, over a workspace of the maps of a few images: what its three kernels share.
//
//   maps_tile       logits and dY, a head at a time                     -> workspace
//   heads_tile      softmax, mixes, norm and their gradients, in place  -> Y, dZ and the parameters' sums
//   products_tile   dq = scale dZ k, dk = scale dZ^T q, dv = Y^T dout
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "attention.cuh"
#include "heads.cuh"

namespace vitdiv::cuda {

// Maps less their mean are held in the inputs' dtype; in float16 times this.
template <class T>
inline constexpr float kMapUnit = std::is_same_v<T, half_t> ? 16384 : 1;
// Logits that meet other heads' are held as a high and a low part where T has 16 bits; in float16 times this,
// for its range.
template <class T>
inline constexpr int kLogitPlanes = sizeof(T) == 2 ? 2 : 1;
template <class T>
inline constexpr float kLogitUnit = std::is_same_v<T, half_t> ? 0.0625f : 1;
// Numbers in 128 bytes: eight lanes bring a row of a tile.
template <class T>
inline constexpr int kLine = 128 / sizeof(T);
template <class T>
inline constexpr int kPiece = 16 / sizeof(T);

// Of the maps of a chunk: some images with all their query rows, or some rows of one image.
template <class T>
struct Workspace {
  // [images, heads, rows, row] each; rows are padded to a multiple of 16 keys.
  Global<T> maps;   // A - mean, or logits that are to be mixed; then Y
  Global<T> low;    // the low parts of those logits
  Global<T> grads;  // dY, then dZ
  int images, heads, rows, row, keys;
  int first_image, first_row;

  DEVICE int64_t place(int image, int head, int i) const {
    return ((int64_t(image) * heads + head) * rows + i) * row;
  }
};

// dZ in float16 is multiplied by a power of two, which a bound of it gives.
template <class T>
inline constexpr bool kBounded = std::is_same_v<T, half_t>;

// left right^T of some of the heads.
template <class T>
struct MapProduct {
  Heads<T> left;   // [all images, heads, queries, width]: q or dout
  Heads<T> right;  // [all images, heads, keys, width]: k or v
  int heads, first_head, width;
  Acc<T> scale;               // of maps times log2(e)
  Global<const Acc<T>> rows;  // [2, all images, heads, queries] of softmax_rows; null: only the product
  int64_t field;              // all images * heads * queries
  bool grads;                 // where it goes to: dY
  int blocks;
};

template <class T>
inline constexpr int maps_stage_row = kLine<T> + Numbers<T>::kPad;

template <class T>
struct MapsKernel {
  static constexpr int kRowTiles = sizeof(T) == 2 ? 2 : 1, kWarps = sizeof(T) == 8 ? 2 : 4;  // at most

  MapProduct<T> products[3];
  Workspace<T> space;
  int queries;  // of an image
  int tiles;    // of the rows of a head
  int stride;   // of rows in shared memory
  bool mixed_logits;
  Acc<T> mean;            // times kMapUnit
  Global<Acc<T>> bounds;  // [images, heads, tiles, warps]: the largest |dY|; where T is bounded

  int64_t shared_bytes(int warps) const {
    const int rows = 16 * kRowTiles * warps, planes = mixed_logits ? kLogitPlanes<T> : 1;
    return ((rows + 2 * kLine<T>)*stride + planes * rows * maps_stage_row<T>)*int64_t(sizeof(T));
  }
};

// The matrices of heads: of the mixes and their gradients.
enum HeadMatrices { kMixT, kMix, kCoupling, kPre, kPreT, kHeadMatrices };
template <class T>
struct MatrixOfHeads {
  Global<const Acc<T>> data;   // null: is not needed
  int64_t image, row, column;  // strides
  Acc<T> factor;
};

template <class T>
struct HeadsKernel {
  static constexpr int kMostWarps = 8;

  Workspace<T> space;
  int heads;
  int places;       // for the heads of one query row, a power of two: others are empty
  int places_bits;  // its logarithm
  int rows;         // of a block
  int blocks;       // of the rows of an image
  int chunk;        // keys that are held at a time
  int stride;       // of rows in shared memory
  bool has_dy;      // and it is needed
  bool goes_on;     // dZ is needed
  bool wants_y;
  bool wants_dmix, wants_dnorm, wants_dpre_mix;
  bool layer_norm;
  bool mixed_logits;
  Acc<T> eps;
  Acc<T> mean;    // maps are kept less this
  Acc<T> beside;  // their mix lacks this times the matrix's sums
  MatrixOfHeads<T> matrices[kHeadMatrices];
  // [heads] or null each
  Global<const Acc<T>> pre_bias, bias, norm_weight, norm_bias;
  Global<Acc<T>> partial;  // [all images, parts, 2 H H + 3 H]
  int parts, first_part;
  Global<const Acc<T>> bounds;  // of maps_tile, so many for an image
  int bounds_count;
  Global<Acc<T>> units;  // [images]: what 1 in dZ stands for; where T is bounded
  // Where everything stands in shared memory, in bytes
  int dense_at, fragments_at, vectors_at, sums_at, tiles_at;
  int matrix_fragments;             // of 512 bytes, for each of the five matrices
  int warp_sums, tile, warp_tiles;  // bytes: a warp's sums, a tile, all tiles of a warp
};

// maps right, or maps^T right, of some of the heads.
template <class T>
struct OutProduct {
  bool grads;  // dZ, or Y
  bool transposed;
  Heads<T> right;  // [all images, heads, keys or queries, width]
  int heads, first_head, width;
  Acc<T> factor;
  Global<T> out;  // [all images, heads, rows, width]
  int64_t out_image, out_head, out_row;
  bool pieces;          // rows of `out` are whole and aligned pieces of 16 bytes
  Global<Acc<T>> sums;  // [heads, rows, width], where rows of an image are shared out; else null
  int tiles, slices;    // of the rows and columns of a head
  int blocks;
};

template <class T>
struct ProductsKernel {
  static constexpr int kRowTiles = sizeof(T) == 2 ? 2 : 1, kWarps = 4;
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  static constexpr int kWidthTiles = sizeof(T) == 8 ? 2 : 4, kWidth = 16 * kWidthTiles;

  OutProduct<T> products[5];
  Workspace<T> space;
  bool first, last;            // rows of an image
  Global<const Acc<T>> units;  // of dZ; where T is bounded
};

// Rows first .. first + count - 1 of one head into a tile of `columns` columns from `column` on, zeros outside
// of [0, end) x [0, width): eight lanes a row.
template <class T>
DEVICE void fetch_rows(Shared<T> tile, int stride, const Heads<T>& from, int64_t head, int first, int count,
                       int end, int column, int columns, int width) {
  const int row0 = thread_x() >> 3, lane = thread_x() & 7, rows = threads() >> 3,
            step = from.pieces ? kPiece<T> : 1;
  for (int x = lane * step; x < columns; x += 8 * step) {
    const bool inside = column + x < width;
    int64_t at = head + (first + row0) * from.row + column + x;
    int to = row0 * stride + x;
    const int64_t next = rows * from.row;
    ROLLED_FOR (int r = row0; r < count; r += rows, at += next, to += rows * stride) {
      const bool there = inside && first + r < end;
      if (from.pieces)
        copy16_async(tile, to, from.data, at, there);
      else
        tile.st(to, there ? from.data.ld(at) : T{});
    }
  }
}

template <class T>
void launch_maps(const MapsKernel<T>& a, int warps, int64_t blocks, void* stream);
template <class T>
void launch_heads(const HeadsKernel<T>& a, int warps, int64_t shared_bytes, void* stream);
template <class T>
void launch_products(const ProductsKernel<T>& a, int64_t blocks, void* stream);

}  // namespace vitdiv::cuda
