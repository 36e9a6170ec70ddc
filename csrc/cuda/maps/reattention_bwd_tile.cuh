// What the two sweeps of re-attention's backward share: a tile of 16 own rows of all heads, queries or keys,
// beside a chunk of the other side, and what is made of it in shared memory.
#pragma once

#include <type_traits>

#include "reattention_bwd.cuh"

namespace vitdiv::cuda {

DEVICE float2 load2(Shared<half_t> s, int i) {
  const uint32_t x = s.template ld<uint32_t>(i);
  return {to_float(half_t{uint16_t(x)}), to_float(half_t{uint16_t(x >> 16)})};
}
DEVICE float2 load2(Shared<bf16_t> s, int i) {
  const uint32_t x = s.template ld<uint32_t>(i);
  return {to_float(bf16_t{uint16_t(x)}), to_float(bf16_t{uint16_t(x >> 16)})};
}
DEVICE float2 load2(Shared<float> s, int i) { return s.template ld<float2>(i); }
DEVICE double2 load2(Shared<double> s, int i) { return s.template ld<double2>(i); }

// A matrix in float64 stays in device memory, from where L1 serves it: chunks need the shared memory. Used as
// HeadMatrix.
template <class M>
struct FarMatrix {
  Global<const M> data;
  int64_t at;
  int heads, row, column;  // strides
  M factor;

  DEVICE FragmentA<M> fragment(int group, int step, int) const {
    FragmentA<M> a;
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const int g = 16 * group + (lane_id() >> 2) + 8 * i, h = step * kDepth<M> + (lane_id() & 3);
      a.r[i] = g < heads && h < heads ? data.ld(at + g * row + h * column) * factor : M(0);
    }
    return a;
  }
};
template <class M>
DEVICE Acc<M> unit_of(const HeadMatrix<M>& matrix, int g) {
  return matrix.units.ld(g);
}
DEVICE double unit_of(const FarMatrix<double>&, int) { return 1; }

// use(group, half, h) for the heads of which this lane has elements of a HeadTile: [group][j][2 half + 0 and
// 1].
template <int GROUPS, class Use>
DEVICE void for_each_head(Use use) {
  UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
    UNROLLED_FOR (int half = 0; half < 2; ++half) use(group, half, 16 * group + tile_row(2 * half));
}

// use(group, j, e) for the elements of a HeadTile.
template <int GROUPS, class Use>
DEVICE void for_each_element(Use use) {
  UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int e = 0; e < 4; ++e) use(group, j, e);
}

// dL is multiplied by a power of two before float16 holds it, which a bound of it gives.
template <class T>
inline constexpr bool kBounded = std::is_same_v<T, half_t>;

// That power; dL mixed afterwards grows.
template <class T>
DEVICE Acc<T> gradient_size(Acc<T> bound, bool mixed) {
  if constexpr (kBounded<T>)
    if (bound > 0 && bound < INFINITY) {
      const int exponent = (mixed ? 8 : 14) - ilogbf(bound);
      return ldexpf(1, exponent < 126 ? exponent : 126);
    }
  return 1;
}

// What one block works with.
template <class NUMBER, bool BY_KEY_, int GROUPS>
struct BackwardTile {
  using T = NUMBER;
  using M = Map<T>;
  using A = Acc<T>;
  using Tile = HeadTile<A, GROUPS>;
  static constexpr bool BY_KEY = BY_KEY_;
  static constexpr int kGroups = GROUPS;
  static constexpr A kScale = MapNumbers<T>::kScale;
  static constexpr bool kWide = kWideNumbers<T>, kFar = kFarMatrices<T>;

  const BackwardKernel<T>& a;
  int warp, image, row0;

  template <class N>
  DEVICE static Shared<N> take(const Piece& piece) {
    return Carver{renewed(piece.offset)}.template take<N>(piece.count);
  }
  DEVICE Shared<M> maps() const { return take<M>(a.memory.maps); }
  DEVICE Shared<T> dz() const { return take<T>(a.memory.maps); }
  DEVICE Shared<T> grads() const { return take<T>(a.memory.grads); }
  DEVICE Shared<A> raw() const { return take<A>(a.memory.raw); }
  DEVICE Shared<A> raw_again() const { return take<A>(kWide ? a.memory.grads : a.memory.raw); }
  DEVICE Shared<A> row_maxes() const { return take<A>(a.memory.row_maxes); }
  DEVICE Shared<A> row_scales() const { return take<A>(a.memory.row_scales); }
  DEVICE Shared<A> row_dots() const { return take<A>(a.memory.row_dots); }
  DEVICE Shared<A> map_sums() const { return take<A>(a.memory.map_sums); }
  DEVICE Shared<A> sums() const { return take<A>(a.memory.sums); }
  DEVICE Shared<A> maxima() const { return take<A>(a.memory.maxima); }
  // The slots' place, while nobody needs them.
  DEVICE Shared<A> space() const { return take<T>(a.memory.slots).template as<A>(); }
  // factor times a matrix in device memory, or times its transpose
  template <class N>
  DEVICE auto matrix(const Piece& piece, int which, Global<const A> from, int64_t at, bool transposed,
                     A factor) const {
    if constexpr (kFar)
      return FarMatrix<N>{from, at, a.heads, transposed ? 1 : a.heads, transposed ? a.heads : 1, factor};
    else
      return HeadMatrix<N>{take<N>(piece), take<A>(a.memory.units[which]), a.heads};
  }
  DEVICE auto mix() const { return matrix<M>(a.memory.mix, 0, a.mix, 0, false, 1); }
  DEVICE auto mix_t() const { return matrix<T>(a.memory.mix_t, 1, a.mix, 0, true, 1); }
  DEVICE auto coupling() const {
    return matrix<M>(a.memory.coupling, 2, a.coupling, image * a.coupling_image, false, 1);
  }
  DEVICE auto pre() const { return matrix<A>(a.memory.pre, 3, a.pre_mix, 0, false, A(kLog2e)); }
  DEVICE auto pre_t() const { return matrix<T>(a.memory.pre_t, 4, a.pre_mix, 0, true, 1); }
  DEVICE Chunk<M> at() const { return a.memory.at.renewed(); }
  DEVICE Chunk<T> at_t() const { return a.memory.at_t.renewed(); }
  DEVICE Chunk<A> raw_at() const { return a.memory.raw_at.renewed(); }

  DEVICE BackwardTile(const BackwardKernel<T>& a)
      : a(a), warp(thread_x() >> 5), image(block_x() / a.tiles), row0(block_x() % a.tiles * kOwnRows) {
    const BackwardMemory<T>& memory = a.memory;
    at().clear_zeros(maps());
    if (memory.grads.count) at_t().clear_zeros(grads());
    if (memory.raw.count) raw_at().clear_zeros(raw());
    const int heads = a.heads;
    if constexpr (!kFar) {
      if (memory.mix.count) mix().fill([&](int g, int h) { return a.mix.ld(g * heads + h); });
      if (memory.mix_t.count) mix_t().fill([&](int g, int h) { return a.mix.ld(h * heads + g); });
      if (memory.coupling.count)
        coupling().fill(
            [&](int g, int h) { return a.coupling.ld(image * a.coupling_image + g * heads + h); });
      if (memory.pre.count) pre().fill([&](int g, int h) { return a.pre_mix.ld(g * heads + h) * A(kLog2e); });
      if (memory.pre_t.count) pre_t().fill([&](int g, int h) { return a.pre_mix.ld(h * heads + g); });
    }
    const Shared<A> vectors = take<A>(memory.vectors);
    for (int g = thread_x(); g < padded_width(heads); g += threads()) {
      A beside = 0, weight = 0, norm_bias = 0, added = 0;
      if (g < heads) {
        if (a.dout)
          for (int h = 0; h < heads; ++h) beside += a.mix.ld(g * heads + h);
        beside = beside * a.beside + (a.bias.p ? a.bias.ld(g) : A(0));
        if (a.layer_norm) weight = a.norm_weight.ld(g), norm_bias = a.norm_bias.ld(g);
        if (a.pre_bias.p) added = a.pre_bias.ld(g) * A(kLog2e);
      }
      const int padded = padded_width(heads);
      vectors.st(g, beside);
      vectors.st(padded + g, weight);
      vectors.st(2 * padded + g, norm_bias);
      vectors.st(3 * padded + g, added);
    }
    sync_block();
  }

  DEVICE A vector(int which, int g) const {
    return take<A>(a.memory.vectors).ld(which * padded_width(a.heads) + g);
  }
  // Where `rows` has what number `c` of row_maxes and so on is, in the sweep over queries.
  DEVICE int64_t global_row(int c) const {
    return (int64_t(image) * a.heads + c / kOwnRows) * a.own_rows + row0 + c % kOwnRows;
  }
  DEVICE static int head_of(int group, int e) { return 16 * group + tile_row(e); }
  // Of a row of maps: of row i or, by key, of column x of the chunk.
  DEVICE int number(int h, int i, int x) const { return h * a.memory.number_row + (BY_KEY ? x : i); }
  DEVICE bool inside(int i, int column) const { return row0 + i < a.own_rows && column < a.other_rows; }

  // use(t, s) for tiles of 16 other rows: s = own . other, of q and k (0) or of dout and v (1).
  template <class Use>
  DEVICE void products(int which, int h, int first, int end, Use use) const {
    const Heads<T> own = a.own[which], other = a.other[which];
    const Scores<T, 1> s = scores_of(which);
    s.fetch_queries(own, image * own.image + h * own.head, row0, a.own_rows);
    s.for_each_tile(other, image * other.image + h * other.head, first / 16, end / 16, a.other_rows, use);
  }

  // The chunk's maps (or what is to be mixed to their logits) and dY, of this warp's heads.
  DEVICE void make(int first, int columns, bool with_maps, bool with_grads) const {
    make(first, columns, with_maps, with_grads, raw());
  }
  DEVICE void make(int first, int columns, bool with_maps, bool with_grads, Shared<A> raw) const {
    if (warp >= a.workers) return;
    const bool mixed_logits = a.pre_mix.p != nullptr;
    for (int h = warp; h < a.heads; h += a.workers) {
      if (with_maps)
        products(0, h, first, first + columns, [&](int t, const auto& s) {
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            UNROLLED_FOR (int half = 0; half < 2; ++half) {
              const int i = tile_row(2 * half), x = 16 * t - first + 8 * j + tile_col(0);
              A z[2];
              UNROLLED_FOR (int e = 0; e < 2; ++e) {
                z[e] = s[0][j][2 * half + e] * a.scale;
                if (!mixed_logits) z[e] = map_of(z[e], h, i, x + e, first);
              }
              if (mixed_logits)
                store2(raw, raw_at().place(h, i, x), z[0], z[1]);
              else
                store2(maps(), at().place(h, i, x), z[0], z[1]);
            }
        });
      if (with_grads)
        products(1, h, first, first + columns, [&](int t, const auto& s) {
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            UNROLLED_FOR (int half = 0; half < 2; ++half)
              store2(grads(), at().place(h, tile_row(2 * half), 16 * t - first + 8 * j + tile_col(0)),
                     s[0][j][2 * half], s[0][j][2 * half + 1]);
        });
    }
  }
  DEVICE A map_of(A logit, int h, int i, int x, int first) const {
    const int from = number(h, i, x);
    return inside(i, first + x)
               ? fast_exp2(logit - row_maxes().ld(from)) * row_scales().ld(from) - a.mean * kScale
               : A(0);
  }

  // Adds left [16, columns] of a chunk times the other side's rows (of q and k, or of dout and v) to
  // out[which] of this warp's heads; `left` is in units of 1 / factor(h).
  template <class Factor>
  DEVICE void multiply(int which, Shared<T> left, int first, int columns, Factor factor) const {
    if (warp >= a.workers) return;
    const bool last = first + a.chunk >= a.other_rows;
    const Scores<T, 1> s = scores_of(which);
    const Heads<T> other = a.other[which];
    constexpr int held = kWidthTiles<T>;
    for (int h = warp; h < a.heads; h += a.workers)
      for (int x0 = 0; x0 < s.padded; x0 += 16 * held) {
        A acc[held][2][4] = {};
        s.for_each_keys(other, image * other.image + h * other.head, first / 16, (first + columns) / 16,
                        a.other_rows, [&](int t, int rows) {
                          for (int k0 = 0; k0 < 16; k0 += kDepth<T>) {
                            FragmentA<T> p;
                            load_a(p, left,
                                   [&](int i, int k) { return at().place(h, i, 16 * t - first + k0 + k); });
                            UNROLLED_FOR (int x = 0; x < held; ++x) {
                              if (x0 + 16 * x >= s.padded) continue;
                              FragmentB<T> b[2];
                              load_b<true>(b, s.memory, [&](int column, int k) {
                                return rows + (k0 + k) * s.stride + x0 + 16 * x + column;
                              });
                              multiply_add<T>(acc[x], p, b);
                            }
                          }
                        });
        const int64_t out = image * a.out_image[which] + h * a.out_head[which];
        UNROLLED_FOR (int x = 0; x < held; ++x) {
          if (x0 + 16 * x >= s.padded) continue;
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            UNROLLED_FOR (int e = 0; e < 4; ++e) {
              // a lane always comes back to the same sums
              const int row = tile_row(e), column = x0 + 16 * x + 8 * j + tile_col(e);
              const int sum = ((which * a.heads + h) * kOwnRows + row) * a.memory.sum_row + column;
              const int64_t far =
                  int64_t(block_x()) * (BY_KEY ? 2 : 1) * a.heads * kOwnRows * a.memory.sum_row + sum;
              A total = acc[x][j][e];
              if (first > 0) total += a.sums_shared ? sums().ld(sum) : a.sums.ld(far);
              if (!last) {
                if (a.sums_shared)
                  sums().st(sum, total);
                else
                  a.sums.st(far, total);
              } else if (row0 + row < a.own_rows && column < s.width) {
                a.out[which].st(out + (row0 + row) * a.out_row[which] + column,
                                from_acc<T>(total * factor(h)));
              }
            }
        }
      }
  }

 private:
  DEVICE Scores<T, 1> scores_of(int which) const {
    const int slot = a.memory.slot;
    Scores<T, 1> s;
    s.memory = take<T>(a.memory.slots).part(warp < a.workers ? warp * slot : 0, slot);
    s.stride = a.stride;
    s.width = a.width[which];
    s.padded = padded_width(s.width);
    return s;
  }
};

}  // namespace vitdiv::cuda
