// Products of 16 x k by k x 16 tiles on tensor cores, in one form for all types: a kernel is written once.
//
//   type            one step            depth k   how
//   half_t, bf16_t  2 mma.m16n8k16      16        operands by ldmatrix, sums in float32
//   float           6 mma.m16n8k8       8         tf32 thrice: operands split into a high and a low part
//   double          4 mma.m8n8k4        4
//
// The result lies in the lanes in the same way for all types: acc[j][e] is row tile_row(e), column 8 j +
// tile_col(e).
#pragma once

#include <cmath>

#include "platform.cuh"

namespace vitdiv::cuda {

template <class T>
struct Numbers {  // half_t and bf16_t
  using Acc = float;
  static constexpr int kDepth = 16, kPad = 8;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2];
  };
};
template <>
struct Numbers<float> {
  using Acc = float;
  static constexpr int kDepth = 8, kPad = 4;
  struct A {
    float hi[4], lo[4];
  };
  struct B {
    float hi[2], lo[2];
  };
};
template <>
struct Numbers<double> {
  using Acc = double;
  static constexpr int kDepth = 4, kPad = 4;
  struct A {
    double r[2];
  };
  struct B {
    double r[1];
  };
};
template <class T>
using Acc = typename Numbers<T>::Acc;
template <class T>
using FragmentA = typename Numbers<T>::A;
template <class T>
using FragmentB = typename Numbers<T>::B;
template <class T>
inline constexpr int kDepth = Numbers<T>::kDepth;

// A row of a tile in shared memory is a whole number of 16 columns, and an odd multiple of 16 bytes long (of
// 32 for double): the rows of a fragment then lie in different banks.
HOST_DEVICE constexpr int padded_width(int width) { return (width + 15) / 16 * 16; }
template <class T>
HOST_DEVICE constexpr int row_stride(int width) {
  return padded_width(width) + Numbers<T>::kPad;
}

DEVICE int lane_id() { return thread_x() & 31; }
DEVICE int tile_row(int e) { return (lane_id() >> 2) + 8 * (e >> 1); }
DEVICE int tile_col(int e) { return 2 * (lane_id() & 3) + (e & 1); }

template <class T>
DEVICE T from_acc(Acc<T> x) {
  if constexpr (sizeof(T) == 2)
    return from_float<T>(x);
  else
    return x;
}

// Two neighbours of a row of a tile.
DEVICE void store2(Shared<half_t> s, int i, float x, float y) {
  s.template st<uint32_t>(i, pack2<half_t>(x, y));
}
DEVICE void store2(Shared<bf16_t> s, int i, float x, float y) {
  s.template st<uint32_t>(i, pack2<bf16_t>(x, y));
}
DEVICE void store2(Shared<float> s, int i, float x, float y) { s.template st<float2>(i, float2{x, y}); }
DEVICE void store2(Shared<double> s, int i, double x, double y) { s.template st<double2>(i, double2{x, y}); }

DEVICE void split_tf32(float x, float& hi, float& lo) {
  hi = to_tf32(x);
  lo = to_tf32(x - hi);
}

// The 16 x depth fragment of A. at(row, k) is the place of an element in s. For 16 bits the 8 elements from
// there on must follow each other and be aligned: along k, or with TRANS along the rows.
template <bool TRANS = false, class T, class At>
DEVICE void load_a(FragmentA<T>& a, Shared<T> s, At at) {
  const int l = lane_id();
  if constexpr (sizeof(T) == 2) {
    if constexpr (TRANS)
      ldmatrix<true>(a.r, s, at(l & 8, (l & 7) + 8 * (l >> 4)));
    else
      ldmatrix<false>(a.r, s, at(l & 15, 8 * (l >> 4)));
  } else if constexpr (sizeof(T) == 4) {
    UNROLLED_FOR (int i = 0; i < 4; ++i)
      split_tf32(s.ld(at((l >> 2) + 8 * (i & 1), (l & 3) + 4 * (i >> 1))), a.hi[i], a.lo[i]);
  } else {
    UNROLLED_FOR (int i = 0; i < 2; ++i) a.r[i] = s.ld(at((l >> 2) + 8 * i, l & 3));
  }
}

// The depth x 16 fragment of B, as two of 8 columns. at(column, k) as above: along k, or with TRANS along the
// columns.
template <bool TRANS = false, class T, class At>
DEVICE void load_b(FragmentB<T> (&b)[2], Shared<T> s, At at) {
  const int l = lane_id();
  if constexpr (sizeof(T) == 2) {
    uint32_t r[4];
    if constexpr (TRANS)
      ldmatrix<true>(r, s, at(8 * (l >> 4), l & 15));
    else
      ldmatrix<false>(r, s, at((l & 7) + 8 * (l >> 4), l & 8));
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int i = 0; i < 2; ++i) b[j].r[i] = r[2 * j + i];
  } else if constexpr (sizeof(T) == 4) {
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int i = 0; i < 2; ++i)
        split_tf32(s.ld(at((l >> 2) + 8 * j, (l & 3) + 4 * i)), b[j].hi[i], b[j].lo[i]);
  } else {
    UNROLLED_FOR (int j = 0; j < 2; ++j) b[j].r[0] = s.ld(at((l >> 2) + 8 * j, l & 3));
  }
}

// The fragment of B whose columns are the rows of A: A Aᵀ needs no second load.
template <class T>
DEVICE void transpose(FragmentB<T> (&b)[2], const FragmentA<T>& a) {
  UNROLLED_FOR (int j = 0; j < 2; ++j) {
    if constexpr (sizeof(T) == 2) {
      UNROLLED_FOR (int i = 0; i < 2; ++i) b[j].r[i] = a.r[j + 2 * i];
    } else if constexpr (sizeof(T) == 4) {
      UNROLLED_FOR (int i = 0; i < 2; ++i) b[j].hi[i] = a.hi[j + 2 * i], b[j].lo[i] = a.lo[j + 2 * i];
    } else {
      b[j].r[0] = a.r[j];
    }
  }
}

// EXACT: a is exact in its high part, so that float32 takes two products.
template <class T, bool EXACT = false>
DEVICE void multiply_add(Acc<T> (&acc)[2][4], const FragmentA<T>& a, const FragmentB<T> (&b)[2]) {
  UNROLLED_FOR (int j = 0; j < 2; ++j) {
    if constexpr (sizeof(T) == 2) {
      mma_16816<T>(acc[j], a.r, b[j].r);
    } else if constexpr (sizeof(T) == 4) {
      // Tensor cores cut sums off where float32 rounds them, so a long sum would drift: each step starts from
      // zero. Low parts of Inf, and times Inf, are NaN.
      float low[4] = {}, step[4] = {};
      if constexpr (!EXACT) mma_1688_tf32(low, a.lo, b[j].hi);
      mma_1688_tf32(low, a.hi, b[j].lo);
      mma_1688_tf32(step, a.hi, b[j].hi);
      UNROLLED_FOR (int e = 0; e < 4; ++e)
        acc[j][e] += fabsf(step[e]) < INFINITY ? step[e] + low[e] : step[e];
    } else {
      mma_884_f64(acc[j][0], acc[j][1], a.r[0], b[j].r[0]);
      mma_884_f64(acc[j][2], acc[j][3], a.r[1], b[j].r[0]);
    }
  }
}

}  // namespace vitdiv::cuda
