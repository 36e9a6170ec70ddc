// The thin layer that kernels are written in. Under nvcc it is the hardware; under a host compiler it is the
// emulation in tests/cuda/emulation, which runs the same kernels on the CPU and checks every access. Kernels
// use nothing of CUDA beside this file, and no torch header.
#pragma once

#if !defined(__CUDACC__)
#include "../../../tests/cuda/emulation/emulation.h"
#else

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"

#define KERNEL __global__ void
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define UNROLLED_FOR(...) _Pragma("unroll") for (__VA_ARGS__)
#define ROLLED_FOR(...) _Pragma("unroll 1") for (__VA_ARGS__)
#define LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)

namespace vitdiv::cuda {

DEVICE int thread_x() { return threadIdx.x; }
DEVICE int threads() { return blockDim.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int blocks_x() { return gridDim.x; }

// The same number, which the compiler takes for a new one: what is computed from it is not held in registers
// from before.
DEVICE int renewed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 16-bit numbers are raw bits, converted explicitly: the same source then compiles for the host without the
// toolkit.
struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

DEVICE float to_float(half_t x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}
DEVICE float to_float(bf16_t x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float to_float(float x) { return x; }
DEVICE double to_float(double x) { return x; }

template <class T>
DEVICE T from_float(float x);
template <>
DEVICE half_t from_float<half_t>(float x) {
  half_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  return r;
}
template <>
DEVICE bf16_t from_float<bf16_t>(float x) {
  bf16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  return r;
}

template <class T>
DEVICE uint32_t pack2(float lo, float hi);
template <>
DEVICE uint32_t pack2<half_t>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
template <>
DEVICE uint32_t pack2<bf16_t>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

// a b + c of pairs of half_t, each rounded once; a is one half of `halves` for both.
template <bool HIGH>
DEVICE uint32_t fma2(uint32_t halves, uint32_t b, uint32_t c) {
  uint32_t r;
  if constexpr (HIGH)
    asm("{.reg .b16 l, h;\n.reg .b32 a;\nmov.b32 {l, h}, %1;\nmov.b32 a, {h, h};\n"
        "fma.rn.f16x2 %0, a, %2, %3;}"
        : "=r"(r)
        : "r"(halves), "r"(b), "r"(c));
  else
    asm("{.reg .b16 l, h;\n.reg .b32 a;\nmov.b32 {l, h}, %1;\nmov.b32 a, {l, l};\n"
        "fma.rn.f16x2 %0, a, %2, %3;}"
        : "=r"(r)
        : "r"(halves), "r"(b), "r"(c));
  return r;
}

// The nearest number with 10 bits after the leading one, as a float.
DEVICE float to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return __uint_as_float(r);
}

DEVICE float fast_exp2(float x) {  // relative error 2^-22
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DEVICE double fast_exp2(double x) { return exp2(x); }
DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }  // relative error 2^-22
DEVICE double reciprocal_sqrt(double x) { return rsqrt(x); }

// Memory. Elements are loaded and stored as T or as a wider V (uint4: 16 bytes), which must then be aligned.
template <class T>
struct Global {
  T* p;
  template <class V = T>
  DEVICE V ld(int64_t i) const {
    return *reinterpret_cast<const V*>(p + i);
  }
  template <class V = T>
  DEVICE void st(int64_t i, V v) const {
    *reinterpret_cast<V*>(p + i) = v;
  }
};

template <class T>
struct Shared {
  T* p;
  template <class V = T>
  DEVICE V ld(int i) const {
    return *reinterpret_cast<const V*>(p + i);
  }
  template <class V = T>
  DEVICE void st(int i, V v) const {
    *reinterpret_cast<V*>(p + i) = v;
  }
  DEVICE Shared part(int i, int) const { return {p + i}; }
  template <class U>
  DEVICE Shared<U> as() const {
    return {reinterpret_cast<U*>(p)};
  }
  DEVICE uint32_t address(int i) const { return static_cast<uint32_t>(__cvta_generic_to_shared(p + i)); }
};

// Hands out the dynamic shared memory piece by piece, 16-byte aligned.
struct Carver {
  int used = 0;
  template <class T>
  DEVICE Shared<T> take(int n) {
    extern __shared__ __align__(128) unsigned char shared_arena[];
    T* p = reinterpret_cast<T*>(shared_arena + used);
    used += (n * int(sizeof(T)) + 15) / 16 * 16;
    return {p};
  }
};

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// Copies 16 bytes, or writes 16 bytes of zeros when not valid; the source's address is then not read. They
// may be read after copy_wait and a barrier.
template <class T>
DEVICE void copy16_async(Shared<T> to, int i, Global<const T> from, int64_t j, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address(i)), "l"(from.p + j),
               "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS_LEFT>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
}

// Collectives: all 32 lanes of the warp, converged.
template <class V>
DEVICE V warp_shuffle_xor(V v, int mask) {
  return __shfl_xor_sync(~0u, v, mask);
}
template <class V>
DEVICE V warp_shuffle(V v, int lane) {
  return __shfl_sync(~0u, v, lane);
}
DEVICE uint32_t warp_ballot(bool b) { return __ballot_sync(~0u, b); }

// Lanes 8m .. 8m + 7 give the addresses of the rows of matrix m, 8 x 8 numbers of 16 bits; lane l receives
// elements 2 (l % 4) and the next of row l / 4, or with TRANS of column l / 4.
template <bool TRANS, class T>
DEVICE void ldmatrix(uint32_t (&r)[4], Shared<T> s, int i) {
  if constexpr (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(s.address(i))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(s.address(i))
                 : "memory");
}
template <bool TRANS, class T>
DEVICE void ldmatrix(uint32_t (&r)[2], Shared<T> s, int i) {
  if constexpr (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(s.address(i))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(s.address(i))
                 : "memory");
}

// c += a b, with c [16, 8], a [16, k], b [k, 8] in the layouts of the PTX manual, "Matrix Fragments for mma".
#define VITDIV_MMA(shape)                                                                \
  asm("mma.sync.aligned." shape " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <class T>
DEVICE void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
DEVICE void mma_16816<half_t>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  VITDIV_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
template <>
DEVICE void mma_16816<bf16_t>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  VITDIV_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
#undef VITDIV_MMA
// k = 8; the operands' low 13 bits are not read
DEVICE void mma_1688_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
// c [8, 8], k = 4
DEVICE void mma_884_f64(double& c0, double& c1, double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
      : "+d"(c0), "+d"(c1)
      : "d"(a), "d"(b));
}

template <class... P>
void launch(const char* operation, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes,
            void* stream, std::type_identity_t<P>... arguments) {
  void* pointers[] = {&arguments...};
  launch(operation, reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, stream, pointers);
}

}  // namespace vitdiv::cuda
#endif
