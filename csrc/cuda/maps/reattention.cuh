// The forward of re-attention in shared memory: arguments of its kernel, and how it is shared out.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention.cuh"
#include "heads.cuh"

namespace vitdiv::cuda {

// Logits that meet other heads' are held as the sum of two bfloat16, which has 16 bits and the range of
// float32.
template <class T>
using Logit = std::conditional_t<sizeof(T) == 2, bf16_t, T>;
template <class T>
inline constexpr int kLogitParts = HeadMatrix<Logit<T>>::kParts;

template <class T>
inline constexpr int kRowTiles = sizeof(T) == 2 ? 2 : 1;
template <class T>
inline constexpr int kOutTiles = sizeof(T) == 8 ? 2 : 4;  // of 16 columns, that a warp holds of the output

// Numbers for each head: what the mix of maps is multiplied by and what is added, then in the layer norm,
// then what the output is multiplied by; the same of the mix of logits.
enum Vector { kFactor, kConstant, kWeight, kAdded, kOutFactor, kPreFactor, kPreConstant, kVectors };

// What is in shared memory, by places in bytes and counts of elements. It is among the arguments, so that no
// register holds it.
template <class T>
struct Layout {
  Chunk<Map<T>> maps;  // of each plane
  Chunk<Logit<T>> logits;
  int planes, mix, pre_mix, vector, rows, slot;
  int mix_at, mix_units_at, pre_mix_at, pre_mix_units_at, vectors_at, row_maxes_at, row_scales_at, slots_at;
  int64_t bytes;

  Layout() = default;
  Layout(int heads, int chunk, bool has_pre_mix, int stride, int warps, int workers)
      : maps(heads, 16 * kRowTiles<T>, chunk), logits(heads, 16 * kRowTiles<T>, chunk) {
    using M = Map<T>;
    constexpr int number = sizeof(T), acc = sizeof(Acc<T>);
    planes = (has_pre_mix ? kLogitParts<T> : 1) * maps.size;
    mix = HeadMatrix<M>::size(heads);
    pre_mix = has_pre_mix ? HeadMatrix<Logit<T>>::size(heads) : 0;
    vector = padded_width(heads);
    rows = heads * 16 * kRowTiles<T>;
    slot = Scores<T, kRowTiles<T>>::size(stride);
    bytes = 0;
    const auto take = [&](int64_t count, int size) {
      const int at = static_cast<int>(bytes);
      bytes += (count * size + 15) / 16 * 16;
      return at;
    };
    // at last the warps' sums for the Gram matrix take the planes' place
    take(std::max(planes, HeadProducts<M, 1>::space(warps) * acc / number), number);
    mix_at = take(mix, number);
    mix_units_at = take(vector, acc);
    pre_mix_at = take(pre_mix, number);
    pre_mix_units_at = take(vector, acc);
    vectors_at = take(kVectors * vector, acc);
    row_maxes_at = take(rows, acc);
    row_scales_at = take(rows, acc);
    slots_at = take(int64_t(workers) * slot, number);
  }
};

template <class T>
struct ForwardKernel {
  Heads<T> q;  // [images, heads, n, width]
  Heads<T> k;  // [images, heads, m, width]
  Heads<T> v;  // [images, heads, m, out_width]
  int heads;
  int n;  // queries
  int m;  // keys
  int width;
  int out_width;
  int tiles;     // of the rows of an image
  Acc<T> scale;  // times log2(e)
  Acc<T> eps;
  Acc<T> mean;  // 1 / m in the maps' units
  bool centred;
  Global<const Acc<T>> pre_mix;      // [heads, heads] or null
  Global<const Acc<T>> pre_bias;     // [heads] or null
  Global<const Acc<T>> mix;          // [heads, heads]
  Global<const Acc<T>> bias;         // [heads] or null
  Global<const Acc<T>> norm_weight;  // [heads]; null: no layer norm
  Global<const Acc<T>> norm_bias;    // [heads]
  int chunk;                         // keys
  int workers;                       // warps that make maps
  int stride;                        // of rows in shared memory
  int slice_heads;                   // of a slice
  int width_slices;                  // of a head
  int slices;                        // of a tile's output, a block each
  Global<T> out;                     // [images, heads, n, out_width]
  int64_t out_image;
  int64_t out_head;
  int64_t out_row;
  bool out_pieces;            // its rows are whole and aligned pieces of 16 bytes
  Global<Acc<T>> partial;     // [images, tiles, heads, heads]
  Global<const Acc<T>> rows;  // [2, images, heads, n] of softmax_rows; null with pre_mix
  int64_t field;              // images * heads * n
  Layout<T> at;
};

// Threads of 8 warps may have 255 registers, of 12 warps 168.
template <class T>
HOST_DEVICE constexpr int max_warps(bool two_groups) {
  return sizeof(T) == 8 || two_groups ? 8 : 12;
}

// How many heads are made at a time and how many keys a chunk has: all heads if that fits, and as many keys
// as let two blocks of few warps share a processor, or else as fit. Less than 32 keys, of which none travel
// while others are multiplied, only where nothing else fits.
template <class T>
void fit(ForwardKernel<T>& a, int& warps, int64_t limit) {
  const int keys = padded_width(a.m), longest = std::min(keys, 128), out_width = 16 * kOutTiles<T>;
  const int most = max_warps<T>(a.heads > 16), least = (a.heads + most - 1) / most;
  for (int shortest : {std::min(keys, 32), 16})
    for (int rounds = least; rounds <= a.heads; ++rounds)
      for (bool two : {true, false})
        for (int chunk = longest; chunk >= (two ? std::min(longest, 48) : shortest); chunk -= 16) {
          const int chunks = (keys + chunk - 1) / chunk;
          a.chunk = padded_width((keys + chunks - 1) / chunks);
          a.workers = (a.heads + rounds - 1) / rounds;
          warps = std::max(a.workers, 4);
          if (two && warps > most / 2) continue;
          const bool sliced = a.out.p && chunks > 1;
          a.slice_heads = sliced ? a.workers : a.heads;
          a.width_slices = sliced ? (a.out_width + out_width - 1) / out_width : 1;
          a.slices = (a.heads + a.slice_heads - 1) / a.slice_heads * a.width_slices;
          a.at = Layout<T>(a.heads, a.chunk, a.pre_mix.p != nullptr, a.stride, warps, a.workers);
          if (a.at.bytes <= (two ? limit / 2 - 1024 : limit)) return;
        }
  throw std::invalid_argument("reattention: " + std::to_string(a.heads) + " heads of width " +
                              std::to_string(std::max(a.width, a.out_width)) +
                              " do not fit the shared memory of this GPU, " + std::to_string(limit) +
                              " bytes");
}

}  // namespace vitdiv::cuda
