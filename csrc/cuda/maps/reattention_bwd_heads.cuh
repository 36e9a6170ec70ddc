// Where heads meet in re-attention's backward: what a warp does with 16 columns of one own row of all heads.
// Everything is read from and left in the chunk's shared memory.
#pragma once

#include "reattention_bwd_tile.cuh"

namespace vitdiv::cuda {

// Sums over columns of dM, of dY times what the layer norm has normalised, and of dY: a lane has those of its
// own columns, of the heads 16 group + tile_row(2 half). kGroups is the number of groups of 16 heads that
// there are.
template <class B>
struct VectorSums {
  typename B::A sums[3][B::kGroups][2];
};

template <class A, int GROUPS, class R>
DEVICE void load_tile(A (&tile)[GROUPS][2][4], Shared<R> chunk, const Chunk<R>& at, int i, int x) {
  UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int half = 0; half < 2; ++half) {
        const auto pair = load2(chunk, at.place(16 * group + tile_row(2 * half), i, x + 8 * j + tile_col(0)));
        tile[group][j][2 * half] = pair.x;
        tile[group][j][2 * half + 1] = pair.y;
      }
}

template <class A, int GROUPS, class R>
DEVICE void store_tile(const A (&tile)[GROUPS][2][4], Shared<R> chunk, const Chunk<R>& at, int i, int x) {
  UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int half = 0; half < 2; ++half) {
        const int h = 16 * group + tile_row(2 * half);
        if (h < at.heads)
          store2(chunk, at.place(h, i, x + 8 * j + tile_col(0)), tile[group][j][2 * half],
                 tile[group][j][2 * half + 1]);
      }
}

// tile = factor times matrix times the heads of a chunk
template <class N, int GROUPS, class Matrix>
DEVICE void mix_chunk(Acc<N> (&tile)[GROUPS][2][4], const Matrix& matrix, Shared<N> chunk, const Chunk<N>& at,
                      int i, int x, Acc<N> factor) {
  for_each_element<GROUPS>([&](int group, int j, int e) { tile[group][j][e] = 0; });
  const Shared<N> parts[1] = {chunk};
  mix_heads<N>(tile, matrix, parts, at, i, x);
  for_each_head<GROUPS>([&](int group, int half, int g) {
    const Acc<N> size = factor * unit_of(matrix, g);
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int e = 2 * half; e < 2 * half + 2; ++e) tile[group][j][e] *= size;
  });
}

// The logits to the base of 2, where they are mixed; -inf for columns that are not there.
template <class B>
DEVICE void mixed_logits(const B& b, typename B::Tile& z, int i, int x, int first) {
  mix_chunk<typename B::A>(z, b.pre(), b.raw(), b.raw_at(), i, x, 1);
  for_each_head<B::kGroups>([&](int group, int half, int g) {
    const typename B::A added = b.vector(3, g);
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int e = 2 * half; e < 2 * half + 2; ++e) {
        const bool there = first + x + 8 * j + tile_col(e) < b.a.other_rows;
        z[group][j][e] = there ? z[group][j][e] + added : -INFINITY;
      }
  });
}

template <class B>
DEVICE void maps_of_logits(const B& b, int i, int x, int first) {
  typename B::Tile z;
  mixed_logits(b, z, i, x, first);
  for_each_element<B::kGroups>([&](int group, int j, int e) {
    const int h = b.head_of(group, e);
    z[group][j][e] =
        h < b.a.heads ? b.map_of(z[group][j][e], h, i, x + 8 * j + tile_col(e), first) : typename B::A(0);
  });
  sync_warp();  // the place may be that of the raw logits
  store_tile(z, b.maps(), b.at(), i, x);
  sync_warp();
}

// The mix of the maps and what stands beside it.
template <class B>
DEVICE void mixed_maps(const B& b, typename B::Tile& y, int i, int x) {
  mix_chunk<typename B::M>(y, b.mix(), b.maps(), b.at(), i, x, 1 / b.kScale);
  for_each_head<B::kGroups>([&](int group, int half, int g) {
    const typename B::A beside = b.vector(0, g);
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int e = 2 * half; e < 2 * half + 2; ++e) y[group][j][e] += beside;
  });
}

// The mixed maps as the layer norm leaves them, before its weight; they and their rstd are 0 outside, where
// the rstd would be Inf without eps.
template <class B>
DEVICE void normalised_maps(const B& b, typename B::Tile& normal, typename B::A (&rstd)[2][2], int i, int x,
                            int first) {
  mixed_maps(b, normal, i, x);
  normalise_heads(normal, rstd, b.a.heads, b.a.eps);
  UNROLLED_FOR (int j = 0; j < 2; ++j)
    UNROLLED_FOR (int e = 0; e < 2; ++e)
      if (!b.inside(i, first + x + 8 * j + tile_col(e))) {
        rstd[j][e] = 0;
        UNROLLED_FOR (int group = 0; group < B::kGroups; ++group)
          normal[group][j][e] = normal[group][j][e + 2] = 0;
      }
}

// Takes dY in `grads` through the layer norm to dM; `normal` is what it has normalised.
template <class B>
DEVICE void through_norm(const B& b, typename B::Tile& normal, VectorSums<B>& sums, int i, int x, int first) {
  using A = typename B::A;
  const int heads = b.a.heads;
  const A part = A(1) / heads;
  A rstd[2][2];
  normalised_maps(b, normal, rstd, i, x, first);
  const Shared<typename B::T> grads = b.grads();
  const auto at = b.at_t();
  UNROLLED_FOR (int j = 0; j < 2; ++j) {  // half of the columns at a time: registers
    const auto place = [&](int group, int half) {
      return at.place(b.head_of(group, 2 * half), i, x + 8 * j + tile_col(0));
    };
    A dn[B::kGroups][4], mean[2] = {}, projection[2] = {};
    UNROLLED_FOR (int group = 0; group < B::kGroups; ++group)
      UNROLLED_FOR (int half = 0; half < 2; ++half) {
        const auto dy = load2(grads, place(group, half));
        const A pair[2] = {dy.x, dy.y}, weight = b.vector(1, b.head_of(group, 2 * half));
        UNROLLED_FOR (int e = 0; e < 2; ++e) {
          const A n = normal[group][j][e + 2 * half];
          sums.sums[1][group][half] += pair[e] * n;
          sums.sums[2][group][half] += pair[e];
          dn[group][e + 2 * half] = pair[e] * weight;
          mean[e] += pair[e] * weight;
          projection[e] += pair[e] * weight * n;
        }
      }
    UNROLLED_FOR (int e = 0; e < 2; ++e)
      UNROLLED_FOR (int mask = 4; mask < 32; mask *= 2) {
        mean[e] += warp_shuffle_xor(mean[e], mask);
        projection[e] += warp_shuffle_xor(projection[e], mask);
      }
    UNROLLED_FOR (int group = 0; group < B::kGroups; ++group)
      UNROLLED_FOR (int half = 0; half < 2; ++half) {
        A dm[2];
        UNROLLED_FOR (int e = 0; e < 2; ++e)
          dm[e] = rstd[j][e] * (dn[group][e + 2 * half] -
                                part * (mean[e] + projection[e] * normal[group][j][e + 2 * half]));
        if (b.head_of(group, 2 * half) < heads) store2(grads, place(group, half), dm[0], dm[1]);
      }
  }
  sync_warp();
}

// The gradient of the maps, from dM in `grads` and from the coupling with the maps.
template <class B>
DEVICE void maps_gradient(const B& b, typename B::Tile& da, int i, int x) {
  using A = typename B::A;
  if (b.a.dout) mix_chunk(da, b.mix_t(), b.grads(), b.at_t(), i, x, 1);
  if (!b.a.coupling.p) return;
  typename B::Tile coupled;
  // the centred maps serve here too: a constant along a row of the maps' gradient has no effect on that of
  // the logits
  mix_chunk<typename B::M>(coupled, b.coupling(), b.maps(), b.at(), i, x, 1 / b.kScale);
  for_each_element<B::kGroups>([&](int group, int j, int e) {
    da[group][j][e] = coupled[group][j][e] + (b.a.dout ? da[group][j][e] : A(0));
  });
}

// The maps themselves, 0 outside.
template <class B>
DEVICE void whole_maps(const B& b, typename B::Tile& p, int i, int x, int first) {
  load_tile(p, b.maps(), b.at(), i, x);
  for_each_element<B::kGroups>([&](int group, int j, int e) {
    const bool inside = b.inside(i, first + x + 8 * j + tile_col(e));
    p[group][j][e] = inside ? p[group][j][e] / b.kScale + b.a.mean : typename B::A(0);
  });
}

// Leaves size times dL in `dz`: the gradient of the logits.
template <class B>
DEVICE void logits_gradient(const B& b, const typename B::Tile& da, int i, int x, int first,
                            typename B::A size) {
  typename B::Tile p;
  whole_maps(b, p, i, x, first);
  for_each_head<B::kGroups>([&](int group, int half, int h) {
    typename B::A row_dot = 0;
    const bool there = h < b.a.heads;
    if (there && !B::BY_KEY) row_dot = b.row_dots().ld(b.number(h, i, x));
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int e = 2 * half; e < 2 * half + 2; ++e) {
        if (there && B::BY_KEY) row_dot = b.row_dots().ld(b.number(h, i, x + 8 * j + tile_col(e)));
        p[group][j][e] *= (da[group][j][e] - row_dot) * size;
      }
  });
  sync_warp();  // the maps are read
  store_tile(p, b.dz(), b.at_t(), i, x);
}

// Where logits are mixed, dL in `dz` becomes the gradient of those before the mix, but for the units of
// pre_t.
template <class B>
DEVICE void mix_back(const B& b, int i, int x) {
  using T = typename B::T;
  typename B::Tile dz;
  for_each_element<B::kGroups>([&](int group, int j, int e) { dz[group][j][e] = 0; });
  const Shared<T> parts[1] = {b.dz()};
  mix_heads<T>(dz, b.pre_t(), parts, b.at_t(), i, x);
  sync_warp();
  store_tile(dz, b.dz(), b.at_t(), i, x);
}

}  // namespace vitdiv::cuda
