// The layer of csrc/cuda/core/platform.cuh on the CPU; README.md tells how it works.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "arithmetic.h"

#define KERNEL void
#define DEVICE inline
#define HOST_DEVICE inline
#define UNROLLED_FOR(...) for (__VA_ARGS__)
#define ROLLED_FOR(...) for (__VA_ARGS__)
#define LAUNCH_BOUNDS(threads, blocks)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

namespace emulation {

using Place = std::source_location;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] void fault(const std::string& what, Place place);
// apart: to make the text at each access of the kernels takes a tenth of the time to compile them
[[noreturn]] void out_of_range(int index, int n, Place place);

enum class Order { kForward, kReverse, kRandom };  // in which warps, lanes and blocks run
struct Config {
  Order order = Order::kForward;
  unsigned seed = 0;
  int64_t shared_limit =
      227 << 10;             // bytes a block may have: sm_90; 163 << 10 is sm_80, 99 << 10 sm_86 and sm_89
  bool as_hardware = false;  // the arithmetic: arithmetic.h
  int64_t withheld = -1;     // which of the tensors allowed lacks its last two bytes; -1: none
  int64_t workspace = 32 << 20;  // bytes that one may have
};
struct Counts {
  uint64_t mma, ldmatrix, ldmatrix_rounds, shuffles, barriers, shared_bytes, global_bytes, copied_bytes,
      launches, switches;
};
inline Config config;
inline Counts counts;

struct Position {
  int thread, threads, block, blocks;
};
inline Position position;  // of the running fiber

enum class Access { kRead, kWrite, kWarpRead };  // kWarpRead: on behalf of the whole warp

// Device memory is what a test has allowed. A kernel may write where `writable`, and read what it or an
// earlier launch wrote, or everything where `initialised`.
void allow(const void* memory, int64_t bytes, bool writable, bool initialised);
void forbid_all();
void check_global(const void* memory, int bytes, Access, Place);

unsigned char* shared_memory(uint32_t offset, int bytes, Access, Place);  // checks, then gives the address
int64_t shared_size();
void collective(void (*operation)(void* const* lane), void* mine, Place);  // the warp's last lane computes
void barrier(Place);
void warp_barrier(Place);
void copy_issue(uint32_t to, const void* from, Place);  // from null: zeros
void copy_commit();
void copy_wait(int groups_left);
void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& thread);

// While `recording`, launches are noted down and do not run.
struct Launch {
  const void* kernel;
  int64_t blocks, threads, shared_bytes;
  std::vector<unsigned char> arguments;  // as a GPU finds them
};
inline bool recording = false;
inline std::vector<Launch> launches;
template <class A>
void add_argument(std::vector<unsigned char>& to, const A& argument) {
  to.resize((to.size() + alignof(A) - 1) / alignof(A) * alignof(A));
  const auto* bytes = reinterpret_cast<const unsigned char*>(&argument);
  to.insert(to.end(), bytes, bytes + sizeof(A));
}

template <class Operands>
Operands& of(void* const* lane, int i) {
  return *static_cast<Operands*>(lane[i]);
}

}  // namespace emulation

namespace vitdiv::cuda {

using emulation::Place;

inline int thread_x() { return emulation::position.thread; }
inline int threads() { return emulation::position.threads; }
inline int block_x() { return emulation::position.block; }
inline int blocks_x() { return emulation::position.blocks; }
inline int renewed(int x) { return x; }

struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

// By bits: _Float16 to float to double is a slow library call in g++. No step is a denormal float: a process
// may flush those.
inline float to_float(half_t x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const float f = magnitude >= 0x7c00u  ? std::bit_cast<float>(magnitude << 13 | 0x7f800000u)
                  : magnitude >= 0x400u ? std::bit_cast<float>((magnitude << 13) + 0x38000000u)
                                        : static_cast<float>(magnitude) * 0x1p-24f;
  return x.bits & 0x8000 ? -f : f;
}
inline float to_float(bf16_t x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

template <class T>
T from_float(float x);
template <>
inline half_t from_float<half_t>(float x) {
  return std::bit_cast<half_t>(static_cast<_Float16>(x));
}
template <>
inline bf16_t from_float<bf16_t>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
template <class T>
uint32_t pack2(float lo, float hi) {
  return from_float<T>(lo).bits | uint32_t(from_float<T>(hi).bits) << 16;
}
template <bool HIGH>
uint32_t fma2(uint32_t halves, uint32_t b, uint32_t c) {
  const auto of = [](uint32_t x, int shift) { return double(to_float(half_t{uint16_t(x >> shift)})); };
  const auto one = [&](int shift) -> uint32_t {  // rounded twice only where a b is far below c
    return std::bit_cast<uint16_t>(
        static_cast<_Float16>(of(halves, HIGH ? 16 : 0) * of(b, shift) + of(c, shift)));
  };
  return one(0) | one(16) << 16;
}
inline float to_tf32(float x) {  // to nearest, ties away from zero
  return std::isfinite(x) ? std::bit_cast<float>((std::bit_cast<uint32_t>(x) + 0x1000u) & ~0x1fffu) : x;
}
inline float fast_exp2(float x) {
  if (!emulation::config.as_hardware) return std::exp2(x);
  const float result = std::abs(x) < 0x1p-126f ? 1 : emulation::approximately(std::exp2(double(x)), x);
  return result < 0x1p-126f ? 0 : result;
}
inline double fast_exp2(double x) { return std::exp2(x); }
inline float reciprocal_sqrt(float x) {
  return emulation::config.as_hardware ? emulation::approximately(1 / std::sqrt(double(x)), x)
                                       : 1 / std::sqrt(x);
}
inline double reciprocal_sqrt(double x) { return 1 / std::sqrt(x); }

template <class T>
struct Global {
  T* p;
  template <class V = std::remove_const_t<T>>
  V ld(int64_t i, Place place = Place::current()) const {
    V v;
    emulation::check_global(p + i, sizeof(V), emulation::Access::kRead, place);
    std::memcpy(&v, p + i, sizeof(V));
    return v;
  }
  template <class V = T>
  void st(int64_t i, V v, Place place = Place::current()) const {
    emulation::check_global(p + i, sizeof(V), emulation::Access::kWrite, place);
    std::memcpy(p + i, &v, sizeof(V));
  }
};

template <class T>
struct Shared {
  uint32_t offset = 0;
  int n = 0;
  uint32_t address(int i, int bytes, Place place) const {
    if (i < 0 || i * int(sizeof(T)) + bytes > n * int(sizeof(T))) emulation::out_of_range(i, n, place);
    return offset + i * sizeof(T);
  }
  template <class V = T>
  V ld(int i, Place place = Place::current()) const {
    V v;
    const uint32_t at = address(i, sizeof(V), place);
    std::memcpy(&v, emulation::shared_memory(at, sizeof(V), emulation::Access::kRead, place), sizeof(V));
    return v;
  }
  template <class V = T>
  void st(int i, V v, Place place = Place::current()) const {
    const uint32_t at = address(i, sizeof(V), place);
    std::memcpy(emulation::shared_memory(at, sizeof(V), emulation::Access::kWrite, place), &v, sizeof(V));
  }
  Shared part(int i, int count, Place place = Place::current()) const {
    return {address(i, count * sizeof(T), place), count};
  }
  template <class U>
  Shared<U> as() const {
    return {offset, n * int(sizeof(T)) / int(sizeof(U))};
  }
};

struct Carver {
  int used = 0;
  template <class T>
  Shared<T> take(int n, Place place = Place::current()) {
    const Shared<T> s{static_cast<uint32_t>(used), n};
    used += (n * int(sizeof(T)) + 15) / 16 * 16;
    if (used > emulation::shared_size())
      emulation::fault("more shared memory carved than launched with", place);
    return s;
  }
};

inline void sync_block(Place place = Place::current()) { emulation::barrier(place); }
inline void sync_warp(Place place = Place::current()) { emulation::warp_barrier(place); }

template <class T>
void copy16_async(Shared<T> to, int i, Global<const T> from, int64_t j, bool valid,
                  Place place = Place::current()) {
  if (valid) emulation::check_global(from.p + j, 16, emulation::Access::kRead, place);
  emulation::copy_issue(to.address(i, 16, place), valid ? from.p + j : nullptr, place);
}
inline void copy_commit() { emulation::copy_commit(); }
template <int GROUPS_LEFT>
void copy_wait() {
  emulation::copy_wait(GROUPS_LEFT);
}

template <class V>
V warp_shuffle(V v, int lane, Place place = Place::current()) {
  struct Operands {
    V in, out;
    int from;
  } mine{v, v, lane & 31};
  emulation::collective(
      +[](void* const* lane) {
        using emulation::of;
        for (int i = 0; i < 32; ++i)
          of<Operands>(lane, i).out = of<Operands>(lane, of<Operands>(lane, i).from).in;
        ++emulation::counts.shuffles;
      },
      &mine, place);
  return mine.out;
}
template <class V>
V warp_shuffle_xor(V v, int mask, Place place = Place::current()) {
  return warp_shuffle(v, (thread_x() & 31) ^ mask, place);
}
inline uint32_t warp_ballot(bool b, Place place = Place::current()) {
  struct Operands {
    bool in;
    uint32_t out;
  } mine{b, 0};
  emulation::collective(
      +[](void* const* lane) {
        using emulation::of;
        uint32_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= uint32_t(of<Operands>(lane, i).in) << i;
        for (int i = 0; i < 32; ++i) of<Operands>(lane, i).out = bits;
      },
      &mine, place);
  return mine.out;
}

template <bool TRANS, class T, int COUNT>
void ldmatrix(uint32_t (&r)[COUNT], Shared<T> s, int i, Place place = Place::current()) {
  static_assert(sizeof(T) == 2 && (COUNT == 2 || COUNT == 4));
  struct Operands {
    uint32_t* r;
    Shared<T> s;
    int i;
    Place place;
  } mine{r, s, i, place};
  emulation::collective(
      +[](void* const* lane) {
        using emulation::of;
        for (int m = 0; m < COUNT; ++m) {
          uint16_t tile[8][8];
          uint32_t address[8];
          int used[8] = {}, rounds = 0;
          for (int row = 0; row < 8; ++row) {
            const Operands& from = of<Operands>(lane, 8 * m + row);
            address[row] = from.s.address(from.i, 16, from.place);
            std::memcpy(tile[row],
                        emulation::shared_memory(address[row], 16, emulation::Access::kWarpRead, from.place),
                        16);
            // different rows in the same banks take turns
            if (std::find(address, address + row, address[row]) == address + row)
              rounds = std::max(rounds, ++used[address[row] / 16 % 8]);
          }
          emulation::counts.ldmatrix_rounds += rounds;
          for (int l = 0; l < 32; ++l) {
            const int x = l / 4, y = l % 4 * 2;
            of<Operands>(lane, l).r[m] = TRANS ? tile[y][x] | uint32_t(tile[y + 1][x]) << 16
                                               : tile[x][y] | uint32_t(tile[x][y + 1]) << 16;
          }
        }
        ++emulation::counts.ldmatrix;
      },
      &mine, place);
}

namespace mma {
template <class R>
struct Operands {
  float* c;
  const R *a, *b;
};
template <int K, int LEAST, class R>
void multiply(void* const* lane, const float (&a)[16][K], const float (&b)[8][K]) {
  const auto sum = emulation::config.as_hardware ? emulation::sum_of_tensor_cores<K, LEAST>
                                                 : emulation::sum_rounded_once<K>;
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      float& c = emulation::of<Operands<R>>(lane, l).c[i];
      c = sum(c, a[l / 4 + 8 * (i / 2)], b[l % 4 * 2 + i % 2]);
    }
  ++emulation::counts.mma;
}
}  // namespace mma

template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               Place place = Place::current()) {
  mma::Operands<uint32_t> mine{c, a, b};
  emulation::collective(
      +[](void* const* lane) {
        float A[16][16], B[8][16];
        for (int l = 0; l < 32; ++l) {
          const auto& from = emulation::of<mma::Operands<uint32_t>>(lane, l);
          for (int e = 0; e < 2; ++e) {
            const auto value = [e](uint32_t r) { return to_float(T{static_cast<uint16_t>(r >> 16 * e)}); };
            for (int i = 0; i < 4; ++i)
              A[l / 4 + 8 * (i % 2)][l % 4 * 2 + 8 * (i / 2) + e] = value(from.a[i]);
            for (int i = 0; i < 2; ++i) B[l / 4][l % 4 * 2 + 8 * i + e] = value(from.b[i]);
          }
        }
        mma::multiply<16, std::is_same_v<T, half_t> ? -14 : -126, uint32_t>(lane, A, B);
      },
      &mine, place);
}
inline void mma_1688_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2],
                          Place place = Place::current()) {
  mma::Operands<float> mine{c, a, b};
  emulation::collective(
      +[](void* const* lane) {
        float A[16][8], B[8][8];
        const auto value = [](float r) {
          return std::bit_cast<float>(std::bit_cast<uint32_t>(r) & ~0x1fffu);
        };
        for (int l = 0; l < 32; ++l) {
          const auto& from = emulation::of<mma::Operands<float>>(lane, l);
          for (int i = 0; i < 4; ++i) A[l / 4 + 8 * (i % 2)][l % 4 + 4 * (i / 2)] = value(from.a[i]);
          for (int i = 0; i < 2; ++i) B[l / 4][l % 4 + 4 * i] = value(from.b[i]);
        }
        mma::multiply<8, -126, float>(lane, A, B);
      },
      &mine, place);
}
inline void mma_884_f64(double& c0, double& c1, double a, double b, Place place = Place::current()) {
  struct Operands {
    double *c[2], a, b;
  } mine{{&c0, &c1}, a, b};
  emulation::collective(
      +[](void* const* lane) {
        using emulation::of;
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < 2; ++i)
            for (int k = 0; k < 4; ++k)
              *of<Operands>(lane, l).c[i] +=
                  of<Operands>(lane, l / 4 * 4 + k).a * of<Operands>(lane, (l % 4 * 2 + i) * 4 + k).b;
        ++emulation::counts.mma;
      },
      &mine, place);
}

inline int64_t shared_memory_limit(const char*) { return emulation::config.shared_limit; }
inline int64_t workspace_bytes(const char*) { return emulation::config.workspace; }

template <class... P, class... A>
void launch(const char* operation, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes,
            void*, A... args) {
  if (shared_bytes > emulation::config.shared_limit || threads > 1024 || blocks < 1 || blocks > 0x7fffffff)
    throw emulation::Fault(std::string(operation) + ": the launch asks for " + std::to_string(blocks) +
                           " blocks of " + std::to_string(threads) + " threads and " +
                           std::to_string(shared_bytes) + " bytes of shared memory");
  if (emulation::recording) {
    emulation::Launch launch{reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, {}};
    (emulation::add_argument<P>(launch.arguments, args), ...);
    emulation::launches.push_back(launch);
    return;
  }
  emulation::run(blocks, threads, shared_bytes, [&] { kernel(args...); });
}

}  // namespace vitdiv::cuda
