// The forward of re-attention: arguments of its kernel, and what is in shared memory.
#pragma once

#include <type_traits>

#include "attention.cuh"
#include "heads.cuh"

namespace vitdiv::cuda {

// Logits that meet other heads' are held as the sum of two bfloat16, which has 16 bits and the range of float32.
template <class T>
using Logit = std::conditional_t<sizeof(T) == 2, bf16_t, T>;
template <class T>
inline constexpr int kLogitParts = HeadMatrix<Logit<T>>::kParts;

template <class T>
inline constexpr int kRowTiles = sizeof(T) == 2 ? 2 : 1;
template <class T>
inline constexpr int kOutTiles = sizeof(T) == 8 ? 2 : 4;  // of 16 columns, that a warp holds of the output

template <class T>
struct ForwardKernel {
  Heads<T> q, k, v;
  int heads, n, m, width, out_width, tiles;  // tiles: row tiles of an image
  Acc<T> scale, eps;                         // scale: times log2(e)
  bool centred;
  Global<const Acc<T>> pre_mix, pre_bias, mix, bias, norm_weight, norm_bias;
  int chunk, workers, stride;  // keys of a chunk; warps that make maps; of their rows in shared memory
  int slice_heads, width_slices, slices;  // slices: of a tile's output, a block each
  Global<T> out;
  int64_t out_image, out_head, out_row;
  Global<Acc<T>> partial;     // [images, tiles, H, H]
  Global<const Acc<T>> rows;  // of softmax_rows; null with pre_mix
  int64_t field;
};

// Numbers for each head: what the mix of maps is multiplied by and what is added, then in the layer norm, then what the
// output is multiplied by; the same of the mix of logits.
enum Vector { kFactor, kConstant, kWeight, kAdded, kOutFactor, kPreFactor, kPreConstant, kVectors };

// Sizes in shared memory, in elements.
template <class T>
struct Layout {
  using M = Map<T>;
  Chunk<M> chunk;
  int planes, matrix, pre_matrix, vector, rows, slot;
  HOST_DEVICE Layout(const ForwardKernel<T>& a, int warps)
      : chunk(a.heads, 16 * kRowTiles<T>, a.chunk),
        planes((a.pre_mix.p ? kLogitParts<T> : 1) * chunk.size),
        matrix(HeadMatrix<M>::size(a.heads)),
        pre_matrix(a.pre_mix.p ? HeadMatrix<Logit<T>>::size(a.heads) : 0),
        vector(padded_width(a.heads)),
        rows(a.heads * 16 * kRowTiles<T>),
        slot(Scores<T, kRowTiles<T>>::size(a.stride)) {
    const int sums =
        HeadProducts<M, 1>::space(warps) * int(sizeof(Acc<T>) / sizeof(M));  // later in the same place
    if (planes < sums) planes = sums;
  }
  int64_t bytes(int workers) const {
    const auto piece = [](int64_t count, int size) { return (count * size + 15) / 16 * 16; };
    constexpr int number = sizeof(T), acc = sizeof(Acc<T>);
    return piece(planes, number) + piece(matrix, number) + piece(pre_matrix, number) +
           piece((2 + kVectors) * vector, acc) + 2 * piece(rows, acc) + piece(workers * slot, number);
  }
};

}  // namespace vitdiv::cuda
