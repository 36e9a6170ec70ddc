// Where heads meet in re-attention's backward: what one warp does with whole query rows of all heads in its
// own shared memory. Rows of a tile are 16 GROUPS places; a query row takes `places` of them, one for each
// head, and as many query rows as fit share a tile, with matrices of a block for each.
#pragma once

#include "reattention_bwd.cuh"

namespace vitdiv::cuda {

// Numbers for each place.
enum HeadVectors { kBeside, kNormWeight, kNormBias, kPreBias, kVectors };

// A matrix is held as fragments, in the order of the lanes, each a sum of so many numbers. A matrix of
// float16 is divided by a power of two.
template <class T>
HOST_DEVICE constexpr int matrix_parts(int which) {
  return sizeof(T) == 8 ? 1 : std::is_same_v<T, bf16_t> && which == kCoupling ? 3 : 2;
}
template <class T>
inline constexpr int kMostParts = sizeof(T) == 8              ? 1
                                  : std::is_same_v<T, bf16_t> ? 3
                                                              : 2;

template <class T, int GROUPS>
inline constexpr int kSteps = 16 * GROUPS / kDepth<T>;

// Sums over a row of a tile: of the places tile_row(0) and tile_row(2).
template <class T>
struct RowSums {
  Acc<T> sums[4] = {};
  DEVICE void add(const FragmentA<T>& a) {
    if constexpr (sizeof(T) == 2) {
      constexpr uint32_t one = std::is_same_v<T, half_t> ? 0x3c003c00 : 0x3f803f80;
      const uint32_t ones[2] = {one, one};
      mma_16816<T>(sums, a.r, ones);
    } else if constexpr (sizeof(T) == 4) {
      UNROLLED_FOR (int i = 0; i < 4; ++i) sums[2 * (i & 1)] += a.hi[i] + a.lo[i];
    } else {
      UNROLLED_FOR (int i = 0; i < 2; ++i) sums[2 * i] += a.r[i];
    }
  }
  DEVICE Acc<T> of(int half) const { return sizeof(T) == 2 ? sums[2 * half] : quad_sum(sums[2 * half]); }
};

// A left factor of ones: the product is the sum over keys.
template <class T>
DEVICE FragmentA<T> ones() {
  FragmentA<T> f;
  UNROLLED_FOR (int i = 0; i < int(sizeof(f) / (sizeof(T) == 2 ? 4 : 8)); ++i) {
    if constexpr (sizeof(T) == 2)
      f.r[i] = std::is_same_v<T, half_t> ? 0x3c003c00 : 0x3f803f80;
    else if constexpr (sizeof(T) == 4)
      f.hi[i] = 1, f.lo[i] = 0;
    else
      f.r[i] = 1;
  }
  return f;
}

DEVICE float2 load2(Shared<float> s, int i) { return s.template ld<float2>(i); }
DEVICE double2 load2(Shared<double> s, int i) { return s.template ld<double2>(i); }

template <class NUMBER, int GROUPS_, bool EXTRA_>
struct HeadRows {
  using T = NUMBER;
  using A = Acc<T>;
  using Tile = HeadTile<A, GROUPS_>;
  static constexpr int GROUPS = GROUPS_, kPlaces = 16 * GROUPS, kTableRow = kPlaces + 8;
  static constexpr bool EXTRA = EXTRA_;  // a layer norm, or mixed logits
  static constexpr A kUnit = kMapUnit<T>;
  static constexpr int kPlanes = kLogitPlanes<T>;

  const HeadsKernel<T>& a;
  int warp, image, block;
  A size;  // of dZ

  // Where this lane's addresses begin in a tile: of 16 rows by 16 columns, of 16 columns by 16 rows, and of its
  // own elements. Not to be worked out again.
  int left_lane, rows_lane, own_lane;
  bool present[GROUPS_][2];  // the heads of this lane's places, 16 group + tile_row(2 half)
  A mix_unit, mix_t_unit, coupling_unit, pre_unit, pre_t_unit;

  template <class N>
  DEVICE static Shared<N> piece(int at, int count) {
    return Carver{at}.template take<N>(count);
  }
  DEVICE Shared<T> tile(int which) const {
    return piece<T>(a.tiles_at + warp * a.warp_tiles + which * a.tile, kPlaces * a.stride);
  }
  DEVICE Shared<T> maps() const { return tile(0); }
  DEVICE Shared<T> grads() const { return tile(1); }  // dM, then dL or dZ
  DEVICE Shared<T> logits(int plane) const { return tile(2 + plane); }
  DEVICE Shared<A> dense(int which) const {  // 0: of kCoupling, 1: of kMixT
    return piece<A>(a.dense_at + which * kPlaces * kTableRow * int(sizeof(A)), kPlaces * kTableRow);
  }
  DEVICE Shared<T> fragments() const {
    return piece<T>(a.fragments_at, (a.mixed_logits ? 5 : 3) * a.matrix_fragments * 512 / int(sizeof(T)));
  }
  // [4, places], then the units of the matrices
  DEVICE Shared<A> vectors() const { return piece<A>(a.vectors_at, kVectors * kPlaces + 8); }
  // This warp's sums of products [2, groups, groups, 256] and of vectors [3, places].
  static constexpr int kMatrixSums = GROUPS * GROUPS * 256, kVectorSums = 3 * kPlaces;
  DEVICE int vector_sums() const { return (a.mixed_logits ? 2 : 1) * kMatrixSums; }
  DEVICE int all_sums() const { return vector_sums() + kVectorSums; }
  DEVICE Shared<A> sums() const { return piece<A>(a.sums_at + warp * a.warp_sums, all_sums()); }

  DEVICE bool wants_sums() const { return a.wants_dmix || a.wants_dnorm || a.wants_dpre_mix; }
  DEVICE int head_of(int place) const { return place & (a.places - 1); }
  DEVICE int row_of(int place) const { return place >> a.places_bits; }
  DEVICE bool is_head(int place) const { return head_of(place) < a.heads; }
  DEVICE int share() const { return kPlaces >> a.places_bits; }

  // --- matrices

  DEVICE bool has(int which) const { return a.matrices[which].data.p != nullptr; }
  DEVICE A element(int which, int g, int h) const {
    const MatrixOfHeads<T>& m = a.matrices[which];
    return m.data.ld((a.space.first_image + image) * m.image + g * m.row + h * m.column) * m.factor;
  }
  DEVICE A element_of_places(int which, int g, int h) const {
    return is_head(g) && is_head(h) && row_of(g) == row_of(h) ? element(which, head_of(g), head_of(h)) : A(0);
  }
  // By one warp.
  DEVICE A unit_of(int which) const {
    A unit = 1;
    if constexpr (kBounded<T>) {
      float largest = 0;
      for (int c = lane_id(); c < a.heads * a.heads; c += 32)
        largest = larger(largest, fabsf(element(which, c / a.heads, c % a.heads)));
      largest = warp_max(largest);
      if (largest > 0 && largest < INFINITY) unit = ldexpf(1, ilogbf(largest));
    }
    return unit;
  }
  // What a matrix has in the place of x.
  DEVICE A as_held(int which, A x) const {
    if constexpr (sizeof(T) == 2) {
      const A scaled = x / unit(which);
      A sum = 0;
      for (int part = 0; part < matrix_parts<T>(which); ++part) sum += to_float(from_float<T>(scaled - sum));
      return sum * unit(which);
    }
    return x;
  }
  DEVICE int fragment_at(int which, int group, int step, int part) const {
    return (which * a.matrix_fragments + (group * kSteps<T, GROUPS> + step) * kMostParts<T> + part) * 512 /
               int(sizeof(T)) +
           lane_id() * kPiece<T>;
  }
  DEVICE void store_fragment(int which, int group, int step, A factor) const {
    const int l = lane_id();
    const auto of = [&](int g, int h) { return element_of_places(which, g, h) * factor; };
    if constexpr (sizeof(T) == 2) {
      float x[8];
      UNROLLED_FOR (int i = 0; i < 8; ++i)
        x[i] = of(16 * group + (l >> 2) + 8 * (i >> 1 & 1), 16 * step + 2 * (l & 3) + (i & 1) + 8 * (i >> 2));
      UNROLLED_FOR (int part = 0; part < kMostParts<T>; ++part) {
        uint32_t r[4];
        UNROLLED_FOR (int i = 0; i < 4; ++i) {
          r[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
          x[2 * i] -= to_float(T{uint16_t(r[i])});
          x[2 * i + 1] -= to_float(T{uint16_t(r[i] >> 16)});
        }
        fragments().template st<uint4>(fragment_at(which, group, step, part), uint4{r[0], r[1], r[2], r[3]});
      }
    } else if constexpr (sizeof(T) == 4) {
      float hi[4], lo[4];
      UNROLLED_FOR (int i = 0; i < 4; ++i)
        split_tf32(of(16 * group + (l >> 2) + 8 * (i & 1), 8 * step + (l & 3) + 4 * (i >> 1)), hi[i], lo[i]);
      fragments().template st<float4>(fragment_at(which, group, step, 0), float4{hi[0], hi[1], hi[2], hi[3]});
      fragments().template st<float4>(fragment_at(which, group, step, 1), float4{lo[0], lo[1], lo[2], lo[3]});
    } else {
      fragments().template st<double2>(fragment_at(which, group, step, 0),
                                       double2{of(16 * group + (l >> 2), 4 * step + (l & 3)),
                                               of(16 * group + (l >> 2) + 8, 4 * step + (l & 3))});
    }
  }
  DEVICE FragmentA<T> fragment(int which, int group, int step, int part) const {
    FragmentA<T> f;
    const int at = fragment_at(which, group, step, part);
    if constexpr (sizeof(T) == 2) {
      const uint4 x = fragments().template ld<uint4>(at);
      f.r[0] = x.x, f.r[1] = x.y, f.r[2] = x.z, f.r[3] = x.w;
    } else if constexpr (sizeof(T) == 4) {
      const float4 x = fragments().template ld<float4>(at),
                   y = fragments().template ld<float4>(at + 32 * kPiece<T>);
      f.hi[0] = x.x, f.hi[1] = x.y, f.hi[2] = x.z, f.hi[3] = x.w;
      f.lo[0] = y.x, f.lo[1] = y.y, f.lo[2] = y.z, f.lo[3] = y.w;
    } else {
      const double2 x = fragments().template ld<double2>(at);
      f.r[0] = x.x, f.r[1] = x.y;
    }
    return f;
  }

  DEVICE HeadRows(const HeadsKernel<T>& a)
      : a(a), warp(thread_x() >> 5), image(block_x() / a.blocks), block(block_x() % a.blocks), size(1) {
    const int warps = threads() >> 5, l = lane_id();
    left_lane = renewed((l & 15) * a.stride + 8 * (l >> 4));
    rows_lane = renewed(((l & 7) + 8 * (l >> 4)) * a.stride + (l & 8));
    own_lane = renewed(tile_row(0) * a.stride + tile_col(0));
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
      UNROLLED_FOR (int half = 0; half < 2; ++half) present[group][half] = is_head(place(group, 2 * half));
    for (int which = warp; which < kHeadMatrices; which += warps)
      if (has(which)) {
        const A unit = unit_of(which);
        if (lane_id() == 0) vectors().st(kVectors * kPlaces + which, unit);
      }
    for (int g = thread_x(); g < kPlaces; g += threads()) {
      A beside = 0, weight = 0, norm_bias = 0, added = 0;
      const int head = head_of(g);
      if (head < a.heads) {
        if (has(kMix) && a.beside != 0)
          for (int h = 0; h < a.heads; ++h) beside += element(kMix, head, h);
        beside = beside * a.beside + (a.bias.p ? a.bias.ld(head) : A(0));
        if (a.layer_norm) weight = a.norm_weight.ld(head), norm_bias = a.norm_bias.ld(head);
        if (a.pre_bias.p) added = a.pre_bias.ld(head) * A(kLog2e);
      }
      vectors().st(kBeside * kPlaces + g, beside);
      vectors().st(kNormWeight * kPlaces + g, weight);
      vectors().st(kNormBias * kPlaces + g, norm_bias);
      vectors().st(kPreBias * kPlaces + g, added);
    }
    // places of heads that are not there stay 0
    for (int which = 0; which < 2 + (a.mixed_logits ? kPlanes : 0); ++which)
      if (which != 1 || a.has_dy || a.goes_on)
        for (int g = 0; g < kPlaces; ++g)
          if (!is_head(g))
            for (int x = lane_id(); x < a.stride; x += 32) tile(which).st(g * a.stride + x, T{});
    if (wants_sums())
      for (int c = lane_id(); c < all_sums(); c += 32) sums().st(c, A(0));
    sync_block();
    for (int c = thread_x(); c < 2 * kPlaces * kPlaces; c += threads()) {
      const int which = c / (kPlaces * kPlaces) ? kMixT : kCoupling, g = c / kPlaces % kPlaces,
                h = c % kPlaces;
      if (has(which))
        dense(which == kMixT).st(g * kTableRow + h, as_held(which, element_of_places(which, g, h)));
    }
    constexpr int pieces = GROUPS * kSteps<T, GROUPS>;
    ROLLED_FOR (int f = warp; f < kHeadMatrices * pieces; f += warps)
      if (has(f / pieces))
        store_fragment(f / pieces, f % pieces / kSteps<T, GROUPS>, f % kSteps<T, GROUPS>,
                       1 / unit(f / pieces));
    mix_unit = unit(kMix) / kUnit;
    mix_t_unit = unit(kMixT);
    coupling_unit = unit(kCoupling) / kUnit;
    pre_unit = unit(kPre) / kLogitUnit<T>;
    pre_t_unit = unit(kPreT);
    if constexpr (kBounded<T>)
      if (a.goes_on) find_size();
    sync_block();
  }
  DEVICE A unit(int which) const {
    if constexpr (kBounded<T>)
      return has(which) ? vectors().ld(kVectors * kPlaces + which) : A(1);
    else
      return 1;
  }

  // The largest sum over a column of absolute values of a matrix.
  DEVICE A column_sum(int which) const {
    A largest = 0;
    for (int h = lane_id(); h < a.heads; h += 32) {
      A sum = 0;
      for (int g = 0; g < a.heads; ++g) sum += fabsf(element(which, h, g));
      largest = larger(largest, sum);
    }
    return warp_max(largest);
  }
  // |dL| is at most twice the largest |dA|, and that at most the sum of a column times the largest |dM|. Each
  // warp finds the same.
  DEVICE void find_size() {
    A bound = 0;
    if (a.has_dy) {
      A dy = 0;
      for (int t = lane_id(); t < a.bounds_count; t += 32)
        dy = larger(dy, a.bounds.ld(int64_t(image) * a.bounds_count + t));
      dy = warp_max(dy);
      if (a.layer_norm) {
        A weight = 0;
        for (int h = 0; h < a.heads; ++h) weight = larger(weight, fabsf(a.norm_weight.ld(h)));
        const A rstd = a.eps > 1e-9f ? reciprocal_sqrt(a.eps) : A(65536);
        dy *= weight * rstd * (2 + square_root(A(a.heads)));
      }
      bound = dy * column_sum(kMixT);
    }
    if (has(kCoupling)) bound += column_sum(kCoupling);
    bound *= 2;
    if (a.mixed_logits) bound *= larger(A(1), column_sum(kPreT));
    if (bound > 0 && bound < INFINITY) {
      const int exponent = 14 - ilogbf(bound);
      size = ldexpf(1, exponent < 126 ? exponent : 126);
    }
    if (block == 0 && thread_x() == 0) a.units.st(image, 1 / size);
  }

  // --- tiles

  // use(group, j, e) for the elements of a HeadTile.
  template <class Use>
  DEVICE static void for_each_element(Use use) {
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        UNROLLED_FOR (int e = 0; e < 4; ++e) use(group, j, e);
  }
  DEVICE static int place(int group, int e) { return 16 * group + tile_row(e); }

  // use(at, place, there) for this lane's pieces of the rows of a tile: where they are in a plane of the
  // workspace and in the tile.
  template <class Use>
  DEVICE void for_each_piece(int row0, int first, int columns, Use use) const {
    const int64_t next = int64_t(a.space.rows) * a.space.row;
    ROLLED_FOR (int r = 0; r < share(); ++r) {
      const bool there = row0 + r < a.space.rows;
      const int64_t row = a.space.place(image, 0, there ? row0 + r : 0) + first;
      ROLLED_FOR (int x = lane_id() * kPiece<T>; x < columns; x += 32 * kPiece<T>) {
        int64_t at = row + x;
        int to = r * a.places * a.stride + x;
        for (int h = 0; h < a.heads; ++h, at += next, to += a.stride) use(at, to, there);
      }
    }
  }
  DEVICE void fetch(Shared<T> to, Global<T> from, int row0, int first, int columns) const {
    for_each_piece(row0, first, columns, [&](int64_t at, int place, bool there) {
      copy16_async(to, place, Global<const T>{from.p}, at, there);
    });
  }
  DEVICE void store(Shared<T> from, Global<T> to, int row0, int first, int columns) const {
    for_each_piece(row0, first, columns, [&](int64_t at, int place, bool there) {
      if (there) to.template st<uint4>(at, from.template ld<uint4>(place));
    });
  }
  DEVICE void clear_places(Shared<T> tile, uint32_t places, int columns) const {
    ROLLED_FOR (int g = 0; g < kPlaces; ++g)
      if (places >> g & 1)
        for (int x = lane_id(); x < columns; x += 32) tile.st(g * a.stride + x, T{});
    sync_warp();
  }
  // Whether any place of the query row of this place is among these.
  DEVICE bool has_any(uint32_t places, int place) const {
    return (places >> (row_of(place) << a.places_bits) & ((1u << a.places) - 1)) != 0;
  }

  // The 16 x depth fragment of places and keys, the depth x 16 one of keys and places, and the one of places
  // and keys.
  DEVICE void load_left(FragmentA<T>& f, Shared<T> from, int group, int x) const {
    load_a(f, from, [&](int g, int k) {
      return 16 * group * a.stride + x + (sizeof(T) == 2 ? left_lane : g * a.stride + k);
    });
  }
  DEVICE void load_rows(FragmentB<T> (&b)[2], Shared<T> from, int group, int x) const {
    load_b(b, from, [&](int g, int k) {
      return 16 * group * a.stride + x + (sizeof(T) == 2 ? rows_lane : g * a.stride + k);
    });
  }
  DEVICE void load_right(FragmentB<T> (&b)[2], Shared<T> from, int step, int x) const {
    load_b<true>(b, from, [&](int column, int k) {
      return step * kDepth<T> * a.stride + x + (sizeof(T) == 2 ? left_lane : k * a.stride + column);
    });
  }
  DEVICE void load_tile(Tile& to, Shared<T> from, int x) const {
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group) {
      if constexpr (sizeof(T) == 2) {
        FragmentA<T> f;
        load_left(f, from, group, x);
        UNROLLED_FOR (int i = 0; i < 4; ++i) {
          to[group][i >> 1][2 * (i & 1)] = to_float(T{uint16_t(f.r[i])});
          to[group][i >> 1][2 * (i & 1) + 1] = to_float(T{uint16_t(f.r[i] >> 16)});
        }
      } else {
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int half = 0; half < 2; ++half) {
            const auto pair = load2(from, own_lane + (16 * group + 8 * half) * a.stride + x + 8 * j);
            to[group][j][2 * half] = pair.x;
            to[group][j][2 * half + 1] = pair.y;
          }
      }
    }
  }
  DEVICE void store_tile(const Tile& from, Shared<T> to, int x) const {
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
      UNROLLED_FOR (int half = 0; half < 2; ++half) {
        if (!present[group][half]) continue;
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          store2(to, own_lane + (16 * group + 8 * half) * a.stride + x + 8 * j, from[group][j][2 * half],
                 from[group][j][2 * half + 1]);
      }
  }
  // tile += matrix times b, of so many parts
  DEVICE void add_product(Tile& tile, int which, int step, const FragmentB<T> (&b)[2], int parts) const {
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group) {
      if constexpr (sizeof(T) == 4) {
        FragmentA<T> f = fragment(which, group, step, 0);
        multiply_add<T>(tile[group], f, b);
      } else {
        UNROLLED_FOR (int part = kMostParts<T> - 1; part >= 0; --part)
          if (part < parts) multiply_add<T>(tile[group], fragment(which, group, step, part), b);
      }
    }
  }
  DEVICE bool has_step(int step) const { return GROUPS == 1 || step * kDepth<T> < a.places; }
  DEVICE void mix(Tile& tile, int which, Shared<T> from, int x) const {
    ROLLED_FOR (int step = 0; step < kSteps<T, GROUPS>; ++step) {
      if (!has_step(step)) continue;
      FragmentB<T> b[2];
      load_right(b, from, step, x);
      add_product(tile, which, step, b, matrix_parts<T>(kMix));
    }
  }
  DEVICE static void clear(Tile& tile) {
    for_each_element([&](int group, int j, int e) { tile[group][j][e] = 0; });
  }
  DEVICE A vector(int which, int group, int half) const {
    return vectors().ld(which * kPlaces + place(group, 2 * half));
  }

  // --- sums over keys

  // Adds to this warp's sums of products; a number's place is a lane's own.
  DEVICE void add_sums(int at, const A (&products)[2][4]) const {
    const Shared<A> to = sums();
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int e = 0; e < 4; ++e) {
        const int c = at + 32 * (4 * j + e) + lane_id();
        to.st(c, to.ld(c) + products[j][e]);
      }
  }
  // The place of row i, column c of these.
  DEVICE static int place_of_sum(int i, int c) {
    return (i / 16 * GROUPS + c / 16) * 256 + 32 * (4 * (c >> 3 & 1) + 2 * (i >> 3 & 1) + (c & 1)) +
           4 * (i & 7) + ((c & 7) >> 1);
  }
  DEVICE void add_vector_sum(int which, int place, A x) const {
    const int at = vector_sums() + which * kPlaces + place;
    sums().st(at, sums().ld(at) + x);
  }
  // Of rows of a tile: the sum over keys of A, less their mean, in units of kUnit; that of A dA.
  struct Sums {
    A maps[GROUPS][2] = {}, dots[GROUPS][2] = {};
  };
  // Adds a chunk, and to the parameters' sums. In 16 bits by sums of products of heads, E[h, g] = sum_j A'_h
  // dM_g and G[h, k] = sum_j A'_h A'_k, A' = A - mean: no dA is made; otherwise the dots are left to
  // add_dots. Where query rows share a tile `spoilt` gets bits of places with what is not finite, in maps and
  // in dM.
  DEVICE void add_rows(Sums& to, int columns, uint32_t (&spoilt)[2]) const {
    constexpr bool makes_dots = sizeof(T) == 2;
    const bool coupled = makes_dots && a.goes_on && has(kCoupling),
               products = a.has_dy && (a.wants_dmix || (makes_dots && a.goes_on));
    ROLLED_FOR (int first = 0; first < GROUPS; ++first)
      ROLLED_FOR (int second = 0; second < GROUPS; ++second) {
        if (GROUPS > 1 && (16 * first >= a.heads || 16 * second >= a.heads)) continue;
        A e[2][4] = {}, g[2][4] = {}, e_sums[2][4] = {}, g_sums[2][4] = {};
        RowSums<T> map_sums;
        ROLLED_FOR (int x = 0; x < columns; x += kDepth<T>) {
          FragmentA<T> left;
          FragmentB<T> right[2];
          load_left(left, maps(), first, x);
          map_sums.add(left);
          if (products) {
            load_rows(right, grads(), second, x);
            multiply_add<T>(e, left, right);
            multiply_add<T, true>(e_sums, ones<T>(), right);
          }
          if (coupled) {
            if (first == second)
              transpose<T>(right, left);
            else
              load_rows(right, maps(), second, x);
            multiply_add<T>(g, left, right);
            multiply_add<T, true>(g_sums, ones<T>(), right);
          }
        }
        UNROLLED_FOR (int half = 0; half < 2; ++half) {
          A dot = 0;
          const int h = 16 * first + tile_row(2 * half);
          UNROLLED_FOR (int j = 0; j < 2; ++j) {
            const int c = 16 * second + 8 * j + tile_col(0), at = h * kTableRow + c;
            A part[2] = {};
            if (makes_dots && products && a.goes_on) {
              const auto w = load2(dense(1), at);
              part[0] += w.x * (e[j][2 * half] * (1 / kUnit) + a.mean * e_sums[j][0]);
              part[1] += w.y * (e[j][2 * half + 1] * (1 / kUnit) + a.mean * e_sums[j][1]);
            }
            if (coupled) {
              const auto w = load2(dense(0), at);
              part[0] += w.x * (g[j][2 * half] * (1 / kUnit) + a.mean * g_sums[j][0]) * (1 / kUnit);
              part[1] += w.y * (g[j][2 * half + 1] * (1 / kUnit) + a.mean * g_sums[j][1]) * (1 / kUnit);
            }
            UNROLLED_FOR (int i = 0; i < 2; ++i)
              if (GROUPS > 1 || row_of(h) == row_of(c + i)) dot += part[i];
          }
          UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
            if (group == first) {
              to.dots[group][half] += quad_sum(dot);
              const A sum = map_sums.of(half);
              if (second == 0) to.maps[group][half] += sum;
            }
        }
        if (a.wants_dmix) {
          add_sums((first * GROUPS + second) * 256, e);
          if (first == 0 && lane_id() < 4)
            UNROLLED_FOR (int j = 0; j < 2; ++j)
              UNROLLED_FOR (int i = 0; i < 2; ++i)
                add_vector_sum(0, 16 * second + 8 * j + tile_col(i), e_sums[j][i]);
        }
        if constexpr (GROUPS == 1 && !EXTRA)
          if (a.places < 16) find_spoilt(spoilt, to.maps[0], e_sums);
      }
  }
  DEVICE static bool finite(A x) { return (x < 0 ? -x : x) < A(INFINITY); }
  DEVICE void find_spoilt(uint32_t (&spoilt)[2], const A (&map_sums)[2], const A (&e_sums)[2][4]) const {
    bool all = true;
    UNROLLED_FOR (int i = 0; i < 2; ++i)
      all = all && finite(map_sums[i]) && finite(e_sums[i][0]) && finite(e_sums[i][1]);
    if (warp_ballot(!all) == 0) return;
    ROLLED_FOR (int half = 0; half < 2; ++half) {
      const uint32_t bad_maps = warp_ballot(!finite(half ? map_sums[1] : map_sums[0])),
                     bad_even = warp_ballot(!finite(half ? e_sums[1][0] : e_sums[0][0])),
                     bad_odd = warp_ballot(!finite(half ? e_sums[1][1] : e_sums[0][1]));
      ROLLED_FOR (int i = 0; i < 8; ++i) {
        const uint32_t place = 1u << (8 * half + i);
        if (bad_maps >> (4 * i) & 1) spoilt[0] |= place;
        if ((i & 1 ? bad_odd : bad_even) >> (i >> 1) & 1) spoilt[1] |= place;
      }
    }
  }
};

}  // namespace vitdiv::cuda
