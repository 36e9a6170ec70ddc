// What the operations of the layer make of their numbers: rounded once, or as hardware of compute capability
// 8.0 rounds.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace emulation {

// To float32, toward zero; what is too large is infinite.
inline float cut(double x) {
  const float nearest = static_cast<float>(x);
  if (!std::isfinite(nearest) || std::abs(double(nearest)) <= std::abs(x)) return nearest;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) - 1);
}

template <int K>
float sum_rounded_once(float c, const float* a, const float* b) {
  double sum = 0;
  for (int k = 0; k < K; ++k) sum += double(a[k]) * b[k];
  return static_cast<float>(c + sum);
}

// Of a number that is not zero; LEAST: that of the format's subnormal numbers.
template <int LEAST>
int exponent(float x) {
  return std::max(static_cast<int>(std::bit_cast<uint32_t>(x) >> 23 & 255) - 127, LEAST);
}

// Tensor cores add K / 2 products at a time to the sum. Products are exact. They and the sum are aligned to
// the largest exponent (a product's is the sum of its factors'), where 24 bits follow the leading one and the
// others are cut off; so aligned they are added exactly, and the result is cut to float32.
template <int K, int LEAST>
float sum_of_tensor_cores(float c, const float* a, const float* b) {
  constexpr int kBits = 24, kLowest = -132;
  for (int half = 0; half < K; half += K / 2) {
    double products[K / 2];
    int largest = c != 0 ? exponent<-126>(c) : kLowest;
    bool finite = std::isfinite(c);
    for (int k = 0; k < K / 2; ++k) {
      const float x = a[half + k], y = b[half + k];
      products[k] = double(x) * y;
      finite &= std::isfinite(products[k]);
      if (products[k] != 0) largest = std::max(largest, exponent<LEAST>(x) + exponent<LEAST>(y));
    }
    if (!finite) return sum_rounded_once<K>(c, a, b);
    const auto one = std::bit_cast<double>(uint64_t(1023 + kBits - largest) << 52);  // 2^(kBits - largest)
    int64_t sum = static_cast<int64_t>(c * one);
    for (double product : products) sum += static_cast<int64_t>(product * one);
    c = cut(sum / one);
  }
  return c;
}

// A relative error of at most 2^-22, that looks random, as a hash of the bits.
inline float approximately(double exact, float of) {
  const uint64_t hash = std::bit_cast<uint32_t>(of) * uint64_t(0x9E3779B97F4A7C15);
  return static_cast<float>(exact * (1 + (static_cast<double>(hash >> 40) * 0x1p-23 - 1) * 0x1p-22));
}

}  // namespace emulation
