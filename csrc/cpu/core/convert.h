// Rows of any accepted dtype as rows of the arithmetic's type, and back (round to nearest even).
#pragma once

#include "../kernels.h"
#include "simd.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

VITDIV_INLINE float float_from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

VITDIV_INLINE uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof f);
  return bits;
}

VITDIV_INLINE float from_bfloat16(uint16_t h) { return float_from_bits(uint32_t(h) << 16); }

VITDIV_INLINE uint16_t to_bfloat16(float f) {
  const uint32_t bits = bits_of(f);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

VITDIV_INLINE float from_half(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t magnitude = h & 0x7fff, sign = uint32_t(h & 0x8000) << 16;
  if (magnitude < 0x400) return float_from_bits(sign | bits_of(float(magnitude) * 0x1p-24f));
  const uint32_t exponent_shift = magnitude < 0x7c00 ? 112u << 23 : 224u << 23;
  return float_from_bits(sign | ((magnitude << 13) + exponent_shift));
#endif
}

VITDIV_INLINE uint16_t to_half(float f) {
#if defined(__F16C__)
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t sign = bits_of(f) >> 16 & 0x8000, bits = bits_of(f) & 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and beyond round to infinity
  if (bits < 0x38800000)                                   // below 2^-14: subnormal
    return uint16_t(sign |
                    (bits_of(float_from_bits(bits) + 0.5f) - bits_of(0.5f)));  // one ulp of 0.5 is 2^-24
  return uint16_t(sign | ((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13));
#endif
}

template <class T>
VITDIV_INLINE bool is_native(ScalarType dtype) {
  return dtype == (sizeof(T) == 8 ? ScalarType::kDouble : ScalarType::kFloat);
}

template <class T>
void load_row(const void* data, ScalarType dtype, int64_t offset, int64_t n, T* out) {
  if (is_native<T>(dtype)) {
    memcpy(out, static_cast<const T*>(data) + offset, size_t(n) * sizeof(T));
    return;
  }
  const uint16_t* x = static_cast<const uint16_t*>(data) + offset;
  if (dtype == ScalarType::kBFloat16)
    for (int64_t i = 0; i < n; i++) out[i] = T(from_bfloat16(x[i]));
  else
    for (int64_t i = 0; i < n; i++) out[i] = T(from_half(x[i]));
}

template <class T>
void store_row(const T* row, int64_t n, void* data, ScalarType dtype, int64_t offset) {
  if (is_native<T>(dtype)) {
    memcpy(static_cast<T*>(data) + offset, row, size_t(n) * sizeof(T));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(data) + offset;
  if (dtype == ScalarType::kBFloat16)
    for (int64_t i = 0; i < n; i++) out[i] = to_bfloat16(float(row[i]));
  else
    for (int64_t i = 0; i < n; i++) out[i] = to_half(float(row[i]));
}

// Rows of a matrix as the arithmetic's type.
template <class T>
struct Rows {
  const T* data;
  int64_t ld;
};

// n rows of `width` from `offset` on: in place, or converted into copy [n, width].
template <class T>
Rows<T> rows_of(const void* data, ScalarType dtype, int64_t offset, int64_t stride, int64_t n, int64_t width,
                T* copy) {
  if (is_native<T>(dtype)) return {static_cast<const T*>(data) + offset, stride};
  for (int64_t i = 0; i < n; i++) load_row(data, dtype, offset + i * stride, width, copy + i * width);
  return {copy, width};
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
