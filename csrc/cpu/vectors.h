// Sets of vectors, their norms, and tiles of the products of all pairs: what the operations on pairs of vectors share.
#pragma once

#include "convert.h"
#include "gemm.h"
#include "scratch.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

constexpr int64_t kTile = 128;
// Row stride of a tile that products also read as columns: an odd number of cache lines, so that they spread over L1.
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

// 1 / max(norm, eps); NaN for NaN.
template <class T>
T inverse_norm(int64_t D, const T* row, T eps, T* norm) {
  *norm = square_root(dot(D, row, row));
  return T(1) / (*norm < eps ? eps : *norm);
}

template <class T>
Rows<T> raw_rows(const Set& set, int64_t item, int64_t i, int64_t n, int64_t D, T* copy) {
  return rows_of(set.view.data, set.view.dtype, set.view.offset[item] + i * set.view.stride_n,
                 set.view.stride_n, n, D, copy);
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
