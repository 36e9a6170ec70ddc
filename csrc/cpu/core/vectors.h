// Sets of vectors, their norms, and tiles of the products of all pairs: what the operations on pairs of
// vectors share.
#pragma once

#include "convert.h"
#include "gemm.h"
#include "scratch.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

constexpr int64_t kTile = 128;
// Row stride of a tile that products also read as columns: an odd number of cache lines, so that they spread
// over L1.
template <class T>
constexpr int64_t kTileStride = kTile + 64 / int64_t(sizeof(T));

struct Set {
  BatchView view;
  int64_t count;
};

template <class T>
T square_root(T x) {
  return sizeof(T) == 8 ? T(__builtin_sqrt(double(x))) : T(__builtin_sqrtf(float(x)));
}

template <class T>
Rows<T> raw_rows(const Set& set, int64_t item, int64_t i, int64_t n, int64_t D, T* copy) {
  return rows_of(set.view.data, set.view.dtype, set.view.offset[item] + i * set.view.stride_n,
                 set.view.stride_n, n, D, copy);
}

// A vector x / m: m = 1, or a power of two where squares or products of such vectors could leave the range of
// T.
template <class T>
struct Vector {
  const T* data;
  T to_unit;       // makes it the unit vector
  T length;        // of the unit vector, 1 but for |x| < eps
  T inverse_norm;  // 1 / max(|x|, eps)
  bool radial;     // |x| > eps: the normalisation takes the part along x out of a gradient
};

// Whether max(norm, eps) is within a third of the exponents on both sides of 1. Not if it is NaN.
template <class T>
VITDIV_INLINE bool is_near_one(T norm) {
  constexpr T most = sizeof(T) == 8 ? T(0x1p340) : T(0x1p42);
  return norm < most && norm > 1 / most;
}

// The largest power of two that a finite size reaches, and at least the smallest normal number.
template <class T>
T power_of_two(T size) {
  Lane<T> bits;
  memcpy(&bits, &size, sizeof bits);
  bits >>= Simd<T>::kMantissaBits;
  bits = (bits < 1 ? 1 : bits) << Simd<T>::kMantissaBits;
  memcpy(&size, &bits, sizeof bits);
  return size;
}

// Of any length. Writes x / m to `copy`, which may be x.
template <class T>
__attribute__((noinline)) Vector<T> far_vector(int64_t D, const T* x, T eps, T* copy) {
  T size = eps;
  bool finite = true;
  for (int64_t k = 0; k < D; k++) {
    const T entry = x[k] < 0 ? -x[k] : x[k];
    finite = finite && entry - entry == 0;
    size = entry > size ? entry : size;
  }
  const T m = finite ? power_of_two(size) : T(1), least = eps / m;
  for (int64_t k = 0; k < D; k++) copy[k] = x[k] / m;
  const T norm = square_root(dot(D, copy, copy)), to_unit = T(1) / (norm < least ? least : norm);
  return {copy, to_unit, norm * to_unit, to_unit / m, !(norm <= least)};
}

// The vector itself, or in `copy`, which may be the vector.
template <class T>
VITDIV_INLINE Vector<T> vector_of(int64_t D, const T* x, T eps, T* copy) {
  const T norm = square_root(dot(D, x, x)), larger = norm < eps ? eps : norm;
  if (!is_near_one(larger)) return far_vector(D, x, eps, copy);
  const T inverse_norm = T(1) / larger;
  return {x, inverse_norm, norm * inverse_norm, inverse_norm, norm > eps};
}

// inverse_norms [n] = 1 / max(|x|, eps); returns whether all are near 1.
template <class T>
bool find_inverse_norms(int64_t D, const Rows<T>& x, int64_t n, T eps, T* inverse_norms) {
  bool near = true;
  for (int64_t r = 0; r < n; r++) {
    const T norm = square_root(dot(D, x.data + r * x.ld, x.data + r * x.ld));
    const T larger = norm < eps ? eps : norm;
    inverse_norms[r] = T(1) / larger;
    near = near && is_near_one(larger);
  }
  return near;
}

// n vectors of any length as vectors near 1 in copy [n, D], which may hold them; to_unit [n] as of a Vector.
template <class T>
Rows<T> near_vectors(int64_t D, const Rows<T>& x, int64_t n, T eps, T* copy, T* to_unit) {
  for (int64_t r = 0; r < n; r++) {
    const Vector<T> v = far_vector(D, x.data + r * x.ld, eps, copy + r * D);
    to_unit[r] = v.to_unit;
  }
  return {copy, D};
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
