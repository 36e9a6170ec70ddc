// What kernels of all pairs of vectors share: sets of vectors, and raw products of a tile of rows with a tile
// of columns. And the places in what pairwise_cosine saves.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../core/mma.cuh"
#include "../core/reduce.cuh"
#include "../core/with_type.cuh"
#include "../kernels.h"

namespace vitdiv::cuda {

// A block's tile, kSize x kSize: kDown by two warps, each with 32 rows and kGroups times 32 columns. All work
// is cut into squares of 32, for that is a word of signs.
template <class T>
struct CosineTile {
  static constexpr int kDown = sizeof(T) == 8 ? 2 : 4, kGroups = kDown / 2;
  static constexpr int kSize = 32 * kDown, kThreads = 64 * kDown;
  static constexpr int kChunk = 128 / sizeof(T);  // of the vectors' width at a time: a cache line
  static constexpr int kStride = row_stride<T>(kChunk);
  static constexpr int kStage = 2 * kSize * kStride;
  // The largest set of vectors whose pairs one block makes, in squares of 32: a warp for each two squares of
  // a row of the upper triangle, 16 in all. Only for 16 bits; sums of others need more registers than 512
  // threads may have.
  static constexpr int kWhole = sizeof(T) == 2 ? 7 : 0;
};

// A lane's part of a warp's products: [32 columns][16 columns][16 rows][8 columns][tile_row, tile_col]
template <class T>
using CosineSums = Acc<T>[CosineTile<T>::kGroups][2][2][2][4];

// Vectors [items, count, width] in device memory; the last stride is 1.
template <class T>
struct Vectors {
  Global<const T> data;
  int64_t item, row;
  int count, width;
  int pieces;  // each vector is whole and aligned pieces of 16 bytes
};

// The distance between the items of a batch. Kernels could read their places from an array, but only from one
// in device memory, and the copy there would hold up the host or fail while a graph is captured.
inline int64_t item_stride(const char* name, const BatchView& view, int64_t items) {
  const int64_t stride = items > 1 ? view.offset[1] - view.offset[0] : 0;
  for (int64_t l = 0; l < items; ++l)
    if (view.offset[l] != view.offset[0] + l * stride)
      throw std::invalid_argument(std::string("the items of ") + name +
                                  " must be at equal distances in memory for the CUDA kernels");
  return stride;
}

template <class T>
Vectors<T> vectors(const char* name, const BatchView& view, int64_t items, int64_t count, int64_t width) {
  constexpr int64_t piece = 16 / sizeof(T);
  const T* data = static_cast<const T*>(view.data) + view.offset[0];
  const int64_t item = item_stride(name, view, items);
  const bool pieces = reinterpret_cast<uintptr_t>(data) % 16 == 0 && width % piece == 0 &&
                      item % piece == 0 && view.stride_n % piece == 0;
  return {{data}, item, view.stride_n, static_cast<int>(count), static_cast<int>(width), pieces};
}

// What is saved, in words of 4 bytes; of two sets unless y is absent. gpu_saved.py says the same in Python.
//   inverse_norms  acc [L, N]     1 / max(|x|, eps)
//   sums   acc [L, D] or [L, N]   signed: of unit vectors; else of the penalties of a vector with all others
//   signs  [L, N, planes, ceil(M / 32)]  abs, relu: bit j % 32 of word j / 32 is set where S > 0 and, in the
//                                 second plane of abs, where S < 0. Within x only squares of 32 on and above
//                                 the diagonal are written.
struct CosineSaved {
  int64_t inverse_norms[2], sums[2], signs, words;
  explicit CosineSaved(const CosineArgs& args) : words(0) {
    const int64_t acc = args.x.dtype == ScalarType::kDouble ? 2 : 1, counts[2] = {args.N, args.M};
    const int sets = args.y.data ? 2 : 1;
    const auto take = [&](int64_t size) {
      const int64_t at = words;
      words += (size + 15) / 16 * 16;
      return at;
    };
    for (int s = 0; s < sets; ++s) inverse_norms[s] = take(acc * args.L * counts[s]);
    for (int s = 0; s < sets; ++s)
      sums[s] = take(acc * args.L * (args.penalty == Penalty::kSigned ? args.D : counts[s]));
    if (sets == 1) inverse_norms[1] = inverse_norms[0], sums[1] = sums[0];
    const int64_t planes = args.penalty == Penalty::kAbs ? 2 : args.penalty == Penalty::kRelu ? 1 : 0;
    signs = take(args.L * args.N * planes * ((args.M + 31) / 32));
  }
};

// Of one set, 0: x, 1: y.
template <class T>
Vectors<T> set_of(const CosineArgs& args, int set) {
  return set && args.y.data ? vectors<T>("y", args.y, args.L, args.M, args.D)
                            : vectors<T>("x", args.x, args.L, args.N, args.D);
}

template <class T>
T* in_words(const void* memory, int64_t word) {
  return reinterpret_cast<T*>(static_cast<uint32_t*>(const_cast<void*>(memory)) + word);
}

// A piece of 16 bytes of a vector, as numbers to compute with; and back.
template <class T>
inline constexpr int kPiece = 16 / sizeof(T);

template <class T>
DEVICE void unpack(const uint4& bits, Acc<T> (&x)[kPiece<T>]) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    UNROLLED_FOR (int i = 0; i < 8; ++i) x[i] = to_float(T{uint16_t(words[i / 2] >> 16 * (i % 2))});
  } else {
    __builtin_memcpy(x, &bits, 16);
  }
}
template <class T>
DEVICE uint4 pack(const Acc<T> (&x)[kPiece<T>]) {
  uint4 bits;
  if constexpr (sizeof(T) == 2)
    bits = {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])};
  else
    __builtin_memcpy(&bits, x, 16);
  return bits;
}

// The warp's part of a tile: where it begins within the tile, and which of its groups of 32 columns it
// computes.
template <class T>
struct CosinePart {
  int row, column, first, end;

  // Of a tile of kSize x kSize. With `triangle` the groups that reach the diagonal or lie above it.
  DEVICE static CosinePart of_tile(int row0, int column0, int rows, int columns, bool triangle) {
    using Tile = CosineTile<T>;
    const int warp = thread_x() >> 5;
    const int row = 32 * (warp % Tile::kDown), column = 32 * Tile::kGroups * (warp / Tile::kDown);
    const int below = (row0 + row - column0 - column) / 32, present = (columns - column0 - column + 31) / 32;
    const int end = present < Tile::kGroups ? present : Tile::kGroups;
    return {row, column, triangle && below > 0 ? below : 0, row0 + row < rows ? end : 0};
  }
  // Of a column of warps, one under another.
  DEVICE static CosinePart of_column(int row0, int column0, int rows, int columns) {
    const int row = thread_x() & ~31, present = (columns - column0 + 31) / 32;
    const int end = present < CosineTile<T>::kGroups ? present : CosineTile<T>::kGroups;
    return {row, 0, 0, row0 + row < rows ? end : 0};
  }
  // Of the upper triangle of `squares` x `squares`, row by row.
  DEVICE static CosinePart of_triangle(int squares) {
    int row = 0, strip = thread_x() >> 5;
    for (; row < squares && strip >= strips(squares - row); ++row) strip -= strips(squares - row);
    const int column = row + CosineTile<T>::kGroups * strip, left = squares - column;
    return {32 * row, 32 * column, 0,
            row == squares                  ? 0
            : left < CosineTile<T>::kGroups ? left
                                            : CosineTile<T>::kGroups};
  }
  HOST_DEVICE static constexpr int strips(int squares) {
    return (squares + CosineTile<T>::kGroups - 1) / CosineTile<T>::kGroups;
  }
  DEVICE bool any() const { return first < end; }
};

// Where a tile is among an item's tiles; with `triangle` only those that reach the diagonal or lie above it
// are counted.
struct TilePlace {
  int row, column;
};
DEVICE TilePlace tile_place(int tile, int row_tiles, int column_tiles, bool triangle) {
  if (!triangle) return {tile / column_tiles, tile % column_tiles};
  int row = 0;
  for (; tile >= row_tiles - row; ++row) tile -= row_tiles - row;
  return {row, row + tile};
}

// x = power * rest with 1 <= rest < 2; x = 1 * x of what has no such parts, subnormal numbers too.
DEVICE void power_and_rest(float x, float& power, float& rest) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t exponent = bits & 0x7f800000u, fraction = (bits & 0x007fffffu) | 0x3f800000u;
  const bool normal = exponent && exponent != 0x7f800000u;
  power = 1, rest = x;
  if (!normal) return;
  __builtin_memcpy(&power, &exponent, sizeof power);
  __builtin_memcpy(&rest, &fraction, sizeof rest);
}
DEVICE void power_and_rest(double x, double& power, double& rest) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint64_t exponent = bits & 0x7ff0000000000000u,
                 fraction = (bits & 0x000fffffffffffffu) | 0x3ff0000000000000u;
  const bool normal = exponent && exponent != 0x7ff0000000000000u;
  power = 1, rest = x;
  if (!normal) return;
  __builtin_memcpy(&power, &exponent, sizeof power);
  __builtin_memcpy(&rest, &fraction, sizeof rest);
}

// Whether a norm, or one over it, is so far from 1 that squares, or products of such vectors, may leave the
// range; also NaN.
template <class A>
DEVICE bool is_far(A norm) {
  constexpr A bound = sizeof(A) == 8 ? A(0x1p340) : A(0x1p42);
  return norm >= bound || norm <= 1 / bound || norm != norm;
}

// Whether a tile has vectors so long or so short that products of raw vectors would leave the range. Then all
// of its vectors are multiplied by their inverse norms first: the products are cosines. float16 has no such
// vectors.
//   inverse_norm(set, i)   the inverse norm of its i-th row (set 0) or column (1), 0 past the last
template <class T>
struct Powers {
  bool any;

  // The same for all warps of a block. `most`: vectors of a tile.
  template <class InverseNorm>
  DEVICE static Powers of_tile(int most, InverseNorm inverse_norm) {
    if constexpr (std::is_same_v<T, half_t>) return {false};
    float far = 0;
    ROLLED_FOR (int i = lane_id(); i < most; i += 32)
      UNROLLED_FOR (int set = 0; set < 2; ++set) {
        const Acc<T> number = inverse_norm(set, i);
        if (number != 0 && is_far(number)) far = 1;
      }
    return {renewed(int(warp_max(far))) != 0};
  }
  // A chunk of `rows` vectors of a set at a place in shared memory.
  template <class InverseNorm>
  DEVICE void scale(Shared<T> memory, int at, int set, int rows, InverseNorm inverse_norm) const {
    constexpr int chunk = CosineTile<T>::kChunk;
    ROLLED_FOR (int e = thread_x(); e < rows * chunk; e += threads()) {
      const int i = e / chunk, to = at + i * CosineTile<T>::kStride + e % chunk;
      const Acc<T> number = inverse_norm(set, i);
      if (number == 0) continue;  // past the last there may be no numbers
      memory.st(to, from_acc<T>(to_float(memory.ld(to)) * number));
    }
  }
  // 1 where products are cosines already.
  DEVICE Acc<T> left_of(Acc<T> inverse_norm) const { return any ? Acc<T>(1) : inverse_norm; }
};

// step(k) for each step of a product's depth. Of 32 and 64 bits the compiler would unroll more than there are
// registers for.
template <class T, class Step>
DEVICE void for_each_step(int depth, Step step) {
  if constexpr (sizeof(T) == 2)
    for (int k = 0; k < depth; k += kDepth<T>) step(k);
  else
    ROLLED_FOR (int k = 0; k < depth; k += kDepth<T>) step(k);
}

// Products of raw vectors. Chunks of their width stream through a ring in shared memory.
template <class T>
struct CosineProducts {
  using Tile = CosineTile<T>;
  Shared<T> memory;   // stages * stage
  int stages, stage;  // 2 or 3; elements of one
  int most;           // rows and columns of a tile, a multiple of 32

  // Vectors first ... of one item, as far as there are any, with zeros up to a multiple of 32.
  DEVICE void fetch(int to, const Vectors<T>& x, int64_t item, int first, int k0, int most) const {
    const int left = (x.count - first + 31) / 32 * 32, rows = left < most ? left : most;
    constexpr int pieces = Tile::kChunk / kPiece<T>;
    if (x.pieces) {
      const int down = thread_x() / pieces, k = thread_x() % pieces * kPiece<T>, step = threads() / pieces;
      const bool inside = k0 + k < x.width;
      int64_t from = item + (first + down) * x.row + k0 + k;
      to += down * Tile::kStride + k;
      for (int r = down; r < rows; r += step, to += step * Tile::kStride, from += step * x.row)
        copy16_async(memory, to, x.data, from, inside && first + r < x.count);
    } else {
      ROLLED_FOR (int p = thread_x(); p < rows * Tile::kChunk; p += threads()) {
        const int r = p / Tile::kChunk, k = p % Tile::kChunk;
        const bool inside = first + r < x.count && k0 + k < x.width;
        memory.st(to + r * Tile::kStride + k, inside ? x.data.ld(item + (first + r) * x.row + k0 + k) : T{});
      }
    }
  }

  // acc += x . y for the warp's part of the tile at (row0, column0); `same`: its columns are among its rows.
  // see(at): a chunk of the rows has come, at that place in the memory.
  template <class InverseNorm, class See>
  DEVICE void add(CosineSums<T>& acc, const CosinePart<T>& part, const Vectors<T>& x, int64_t item, int row0,
                  const Vectors<T>& y, int64_t y_item, int column0, bool same, Powers<T> powers,
                  InverseNorm inverse_norm, See see) const {
    const int chunks = (x.width + Tile::kChunk - 1) / Tile::kChunk;
    const int columns = (same ? column0 - row0 : most) * Tile::kStride;  // behind the rows
    int at = 0, ahead = 0;  // where the chunk in use is, and the next to be fetched goes
    const auto after = [&](int at) { return at == (stages - 1) * stage ? 0 : at + stage; };
    const auto fetch_chunk = [&](int t) {
      const int to = ahead;
      ahead = after(ahead);
      if (t < chunks) {
        fetch(to, x, item, row0, t * Tile::kChunk, most);
        if (!same) fetch(to + columns, y, y_item, column0, t * Tile::kChunk, most);
      }
      copy_commit();
    };
    for (int t = 0; t < stages - 1; ++t) fetch_chunk(t);
    for (int t = 0; t < chunks; ++t, at = after(at)) {
      if (stages == 3)
        copy_wait<1>();
      else
        copy_wait<0>();
      sync_block();  // also: the stage that is fetched next is no longer in use
      fetch_chunk(t + stages - 1);
      see(at);
      if (powers.any) {
        powers.scale(memory, at, 0, most, inverse_norm);
        if (!same) powers.scale(memory, at + columns, 1, most, inverse_norm);
        sync_block();
      }
      if (!part.any()) continue;
      const int rows_at = at + part.row * Tile::kStride,
                columns_at = at + columns + part.column * Tile::kStride;
      for_each_step<T>(Tile::kChunk, [&](int k) {
        FragmentA<T> a[2];
        UNROLLED_FOR (int r = 0; r < 2; ++r)
          load_a(a[r], memory,
                 [&](int row, int i) { return rows_at + (16 * r + row) * Tile::kStride + k + i; });
        UNROLLED_FOR (int g = 0; g < Tile::kGroups; ++g) {
          if (g < part.first || g >= part.end) continue;
          UNROLLED_FOR (int h = 0; h < 2; ++h) {
            FragmentB<T> b[2];
            load_b(b, memory, [&](int column, int i) {
              return columns_at + (32 * g + 16 * h + column) * Tile::kStride + k + i;
            });
            UNROLLED_FOR (int r = 0; r < 2; ++r) multiply_add<T>(acc[g][h][r], a[r], b);
          }
        }
      });
    }  // only empty groups are left to wait for
  }
};

// 1 / max(norm, eps); of a NaN a NaN. A vector that was divided by eps has exactly inverse_eps.
template <class A>
DEVICE A inverse_of_norm(A norm, A eps, A inverse_eps) {
  return norm <= eps ? inverse_eps : 1 / norm;
}
inline double inverse_of(double eps) { return eps > 0 ? 1 / eps : HUGE_VAL; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pieces of scratch for numbers of the arithmetic's type: where each begins, in bytes.
struct Pieces {
  int64_t number, size = 0;  // bytes of a number, and of all pieces
  explicit Pieces(ScalarType dtype) : number(accumulator_bytes(dtype)) {}
  int64_t take(int64_t numbers) {
    const int64_t at = size;
    size += ceil_div(numbers * number, 256) * 256;
    return at;
  }
};

template <class A>
A* place_in(void* scratch, int64_t byte) {
  return reinterpret_cast<A*>(static_cast<char*>(scratch) + byte);
}

// As many stages of the ring as let that many blocks share a processor; each takes 1 KiB more than it asks
// for.
inline int stages_of(const char* operation, int64_t stage_bytes, int64_t others, int blocks) {
  return blocks * (3 * stage_bytes + others + 1024) <= shared_memory_limit(operation) + 1024 ? 3 : 2;
}

// Inverse norms of the vectors of one set (0: x, 1: y), acc [L, count].
void vector_inverse_norms(const char* operation, const CosineArgs& args, int set, void* inverse_norms,
                          void* stream);

int64_t signed_forward_scratch(const CosineForward& args);
void signed_forward(const CosineForward& args, void* scratch, void* stream);
void signed_backward(const CosineBackward& args, void* stream);

}  // namespace vitdiv::cuda
