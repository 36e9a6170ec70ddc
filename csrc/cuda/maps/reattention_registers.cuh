// Re-attention's forward for few heads of 16-bit numbers: mixed maps stay in the registers that made them.
#pragma once

#include <algorithm>

#include "../../arguments/reattention.h"
#include "attention.cuh"

namespace vitdiv::cuda {

// Widths that there is a kernel for, and of how many heads a warp holds the output, 16 rows each: 96
// registers. At most 12 warps, so that a thread may have 168.
struct OwnHeads {
  int width, own;
};
inline constexpr OwnHeads kOwnHeads[] = {{32, 6}, {48, 4}, {64, 3}};
inline constexpr int kRegisterTiles = 3, kRegisterWarps = 12;

// Heads that are mixed at a time, and bytes that the weights of one take: float16.
HOST_DEVICE constexpr int mixed_at_a_time(int own) { return own == 4 ? 4 : 3; }
HOST_DEVICE constexpr int weights_bytes(int own) { return own > 4 ? 16 : 8; }

// What is in shared memory, by places in bytes. Rows of queries, keys and values are padded as everywhere.
struct RegisterLayout {
  int parts;        // that share the heads of a tile of rows, a warp each
  int slots;        // of queries and keys: one for each head, and for each warp
  int padded;       // heads whose maps are there, zeros among them
  int buffers = 0;  // of values and maps: with one, the block waits twice for each 16 keys
  int head, statistics_at, weights_at, factors_at, queries_at, keys_at, values_at, maps_at;
  int bytes;

  RegisterLayout() = default;
  RegisterLayout(int heads, int width, int own, int buffers) : buffers(buffers) {
    const int step = mixed_at_a_time(own), row = row_stride<half_t>(width);
    parts = (heads + own - 1) / own;
    slots = std::max(heads, kRegisterTiles * parts);
    padded = (heads + step - 1) / step * step;
    head = 16 * row;
    bytes = 0;
    const auto take = [&](int size) {
      const int at = bytes;
      bytes += (size + 15) / 16 * 16;
      return at;
    };
    statistics_at = take(heads * 16 * kRegisterTiles * 8);
    weights_at = take(parts * padded * weights_bytes(own));
    factors_at = take(parts * own * 8);
    queries_at = take(slots * kRegisterTiles * head * 2);
    keys_at = take(heads * head * 2);
    values_at = take(buffers * heads * head * 2);
    maps_at = take(buffers * padded * kRegisterTiles * 512);
  }
};

// The layout where the kernel fits, else one of no buffers. Blocks of few warps are to share a processor, which
// then has kRegisterWarps, before they have two buffers.
inline RegisterLayout fit_registers(int heads, int width, int64_t limit) {
  for (const auto [each, own] : kOwnHeads) {
    const int warps = kRegisterTiles * ((heads + own - 1) / own);
    if (each != width || warps > kRegisterWarps) continue;
    for (int blocks = kRegisterWarps / warps; blocks > 0; --blocks)
      for (int buffers : {2, 1}) {
        const RegisterLayout at(heads, width, own, buffers);
        if (at.bytes <= (blocks > 1 ? limit / blocks - 1024 : limit)) return at;
      }
  }
  return {};
}

// No pre_mix, layer norm or Gram matrix. `rows`: what softmax_rows gave.
void launch_registers(const ReattentionForward& args, const RegisterLayout& at, const float* rows,
                      void* stream);

}  // namespace vitdiv::cuda
