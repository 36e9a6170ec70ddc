// Vectors of float and double for the instruction set that this file is compiled for, in the compiler's own
// vector types, so that the same code serves AVX-512, AVX2, SSE2 and NEON.
//
// Kernel sources include no torch header and no C++ library template: their weak symbols, compiled for
// AVX-512, could otherwise be the copies that the linker keeps for the whole library, and crash on a lesser
// machine.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define VITDIV_INLINE inline __attribute__((always_inline))

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

// kMaxRows: rows of the matrix-product micro-kernel; rows x 2 accumulators, 2 operands and 1 broadcast fill
// the registers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kMaxRows = 14;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kMaxRows = 6;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kMaxRows = 12;
#else
constexpr int kVectorBytes = 16, kMaxRows = 6;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Lane;
  typedef Lane Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int32_t kSignBit = INT32_MIN, kMantissaBits = 23;
  // 1.5 * 2^23 + 127: adding it to t rounds to an integer, whose exponent field is then in the lowest
  // mantissa bits
  static constexpr float kRound = 12583039.f;
  static constexpr float kZeroExponent = -127.f;  // an exponent field of 0: the number 0
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Lane;
  typedef Lane Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t kSignBit = INT64_MIN, kMantissaBits = 52;
  static constexpr double kRound = 6755399441056767.0;  // 1.5 * 2^52 + 1023
  static constexpr double kZeroExponent = -1023.0;
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using Int = typename Simd<T>::Int;
template <class T>
using Lane = typename Simd<T>::Lane;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));
template <class T>
constexpr int kPanel = 2 * kLanes<T>;  // columns of the micro-kernel's panels

VITDIV_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
VITDIV_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
VITDIV_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
VITDIV_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
VITDIV_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
VITDIV_INLINE void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}

template <class T>
VITDIV_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// a > b ? a : b in each lane, so b where one is NaN: written as a comparison it compiles to two instructions.
// (maskz: of the plain form gcc 12 warns that it is uninitialised.)
template <class T>
VITDIV_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_max_ps(__mmask16(-1), (__m512)a, (__m512)b);
  else
    return (Vec<T>)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  else
    return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

template <class T>
VITDIV_INLINE T sum_lanes(Vec<T> v) {
  T s = 0;
  for (int i = 0; i < kLanes<T>; i++) s += v[i];
  return s;
}

// Lane i holds i.
template <class T>
VITDIV_INLINE Int<T> lane_index() {
  Int<T> v;
  for (int i = 0; i < kLanes<T>; i++) v[i] = i;
  return v;
}

// v in the first n lanes, fill in the rest.
template <class T>
VITDIV_INLINE Vec<T> first_lanes(Vec<T> v, int64_t n, T fill) {
  return lane_index<T>() < (Lane<T>(n) - Int<T>{}) ? v : broadcast<T>(fill);
}

template <class T>
VITDIV_INLINE Vec<T> abs(Vec<T> v) {
  return (Vec<T>)((Int<T>)v & ~Simd<T>::kSignBit);
}

// Bit i: lane i is greater than 0.
template <class T>
VITDIV_INLINE uint32_t positive_lanes(Vec<T> v);

template <>
VITDIV_INLINE uint32_t positive_lanes<float>(Vec<float> v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_GT_OQ)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<float>; i++) bits |= uint32_t(v[i] > 0) << i;
  return bits;
#endif
}

template <>
VITDIV_INLINE uint32_t positive_lanes<double>(Vec<double> v) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<double>; i++) bits |= uint32_t(v[i] > 0) << i;
  return bits;
}

// Lane i is value where bit i of bits is set, else 0.
template <class T>
VITDIV_INLINE Vec<T> lanes_from_bits(uint32_t bits, T value) {
  Int<T> lane_bit;
  for (int i = 0; i < kLanes<T>; i++) lane_bit[i] = Lane<T>(1) << i;
  const Int<T> set = ((Lane<T>(bits) - Int<T>{}) & lane_bit) != 0;
  return (Vec<T>)((Int<T>)broadcast<T>(value) & set);
}

// Polynomials for 2^r on [-1/2, 1/2], interpolated at the Chebyshev nodes for the relative error: 3e-9 and
// 6e-20. The coefficients of the highest power come first; the last is 1.
template <class T>
struct Exp2Polynomial;

template <>
struct Exp2Polynomial<float> {
  static constexpr float kCoefficients[] = {1.5461444698569e-4f,
                                            1.340042817761584e-3f,
                                            9.618056678524638e-3f,
                                            5.550327226670302e-2f,
                                            2.402265092228876e-1f,
                                            6.931472067028326e-1f,
                                            1.f};
  static constexpr int kCount = 7;
};

template <>
struct Exp2Polynomial<double> {
  static constexpr double kCoefficients[] = {2.5733568308756891e-11,
                                             4.4566753410492059e-10,
                                             7.0548943863483480e-9,
                                             1.0178051192960649e-7,
                                             1.3215486815999977e-6,
                                             1.5252733856293466e-5,
                                             1.5403530393362756e-4,
                                             1.3333558146390353e-3,
                                             9.6181291076284831e-3,
                                             5.5504108664821699e-2,
                                             2.4022650695910071e-1,
                                             6.9314718055994531e-1,
                                             1.0};
  static constexpr int kCount = 13;
};

// 2^t of Count vectors, for t <= 0; 0 below the normal range, NaN for NaN.
template <class T, int Count>
VITDIV_INLINE void exp2_nonpositive(Vec<T>* t) {
  const Vec<T> lowest = broadcast<T>(Simd<T>::kZeroExponent);
  Vec<T> power[Count], p[Count];
#pragma GCC unroll 4
  for (int i = 0; i < Count; i++) {
    t[i] = larger<T>(lowest, t[i]);  // in this order a NaN stays
    const Vec<T> shifted = t[i] + Simd<T>::kRound;
    power[i] = (Vec<T>)((Int<T>)shifted << Simd<T>::kMantissaBits);
    // not t - (shifted - kRound), of which the compiler makes a second constant, and registers are short here
    t[i] = t[i] + (Simd<T>::kRound - shifted);
    p[i] = t[i] * Exp2Polynomial<T>::kCoefficients[0] + Exp2Polynomial<T>::kCoefficients[1];
  }
#pragma GCC unroll 16
  for (int c = 2; c < Exp2Polynomial<T>::kCount; c++)
#pragma GCC unroll 4
    for (int i = 0; i < Count; i++) p[i] = p[i] * t[i] + Exp2Polynomial<T>::kCoefficients[c];
#pragma GCC unroll 4
  for (int i = 0; i < Count; i++) t[i] = p[i] * power[i];
}

template <class T>
VITDIV_INLINE Vec<T> exp2_nonpositive(Vec<T> t) {
  exp2_nonpositive<T, 1>(&t);
  return t;
}

template <class T>
T dot(int64_t n, const T* x, const T* y) {
  Vec<T> acc0 = {}, acc1 = {};
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= n; i += 2 * kLanes<T>) {
    acc0 += load(x + i) * load(y + i);
    acc1 += load(x + i + kLanes<T>) * load(y + i + kLanes<T>);
  }
  T total = sum_lanes<T>(acc0 + acc1);
  for (; i < n; i++) total += x[i] * y[i];
  return total;
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
