// The arguments of the two sweeps of re-attention's backward.
#pragma once

#include "../kernels.h"
#include "attention.cuh"
#include "heads.cuh"

namespace vitdiv::cuda {

inline constexpr int kOwnRows = 16;
// Threads of 12 warps may have 168 registers, of 8 warps 255.
template <class T, int GROUPS>
inline constexpr int kBackwardWarps = sizeof(T) == 8 || GROUPS > 1 ? 8 : 12;
// Tiles of 16 columns whose sums a warp holds at a time
template <class T>
inline constexpr int kWidthTiles = sizeof(T) == 8 ? 2 : 4;

template <class T>
inline constexpr bool kWideNumbers = sizeof(T) > 2;
// Matrices of heads stay in device memory.
template <class T>
inline constexpr bool kFarMatrices = sizeof(T) == 8;

// A piece of shared memory: where it begins, in bytes, and how many numbers it has.
struct Piece {
  int offset, count;
};

// Where everything stands in shared memory. The host works it out: a kernel's arguments cost no registers.
template <class T>
struct BackwardMemory {
  Chunk<Map<T>> at;
  Chunk<T> at_t;  // the same places
  Chunk<Acc<T>> raw_at;
  Piece maps;   // A - mean, then dL
  Piece grads;  // dY, then dM, then Y; in 32 and 64 bits at last raw_again
  Piece raw;    // scale q k, where those are mixed; in 32 and 64 bits the maps' place
  Piece mix, mix_t, coupling, pre, pre_t, units[5];
  Piece vectors;                          // [4, heads]: bias beside the mix, norm_weight, norm_bias, pre_bias
  Piece row_maxes, row_scales, row_dots;  // [heads, number_row]
  Piece map_sums;                         // [heads, 16], by query
  Piece slots, sums, maxima;
  int number_row, slot, sum_row, bytes;
};

template <class T>
struct BackwardKernel {
  Heads<T> own[2];    // [images, heads, own_rows, width]: q and dout; by key k and v
  Heads<T> other[2];  // [images, heads, other_rows, width]: k and v; by key q and dout
  int width[2];       // d, dv
  int heads;
  int own_rows;
  int other_rows;
  int tiles;  // of the own rows
  int images;
  int chunk;     // of the other rows
  int workers;   // warps that make maps
  int warps;     // of a block
  int stride;    // of rows in shared memory
  bool dout;     // is given
  bool goes_on;  // the gradient of the maps is needed
  bool layer_norm;
  Acc<T> scale;      // of q k, times log2(e) where the logits are not mixed
  Acc<T> out_scale;  // of dq and dk
  Acc<T> eps;
  Acc<T> mean;                       // maps are kept less this
  Acc<T> beside;                     // their mix lacks this times the matrix's sums
  Global<const Acc<T>> pre_mix;      // [heads, heads] or null
  Global<const Acc<T>> pre_bias;     // [heads] or null
  Global<const Acc<T>> mix;          // [heads, heads]
  Global<const Acc<T>> bias;         // [heads] or null
  Global<const Acc<T>> coupling;     // [images or 1, heads, heads] or null
  Global<const Acc<T>> norm_weight;  // [heads] or null
  Global<const Acc<T>> norm_bias;    // [heads] or null
  int64_t coupling_image;            // 0: all images share one
  // rows [3, images, H, queries]: the largest logit in units of ln 2, MapNumbers::kScale / sum of
  // exponentials, and, from the sweep over queries for that over keys, the mean of dA by A. Likewise bounds
  // [images, query tiles] of |dL|.
  Global<Acc<T>> rows;
  Global<Acc<T>> bounds;
  int64_t field;  // images * H * queries
  int query_tiles;
  Global<T> out[2];  // [images, heads, own_rows, width]: dq; by key dk and dv
  int64_t out_image[2];
  int64_t out_head[2];
  int64_t out_row[2];
  bool sums_shared;
  Global<Acc<T>> sums;     // otherwise: a block's own [outputs, H, 16, sum_row]
  Global<Acc<T>> partial;  // [images, tiles, 2 H H + 3 H]
  bool wants_dpre_mix;
  bool wants_dmix;
  bool wants_dnorm;
  BackwardMemory<T> memory;
};

}  // namespace vitdiv::cuda
