// Scratch memory and the split of work over threads.
#pragma once

#include <cstdlib>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

// Hands out pieces of one block, each on cache lines of its own. A structure of scratch pieces takes them in its
// constructor: built once over an empty arena it counts the bytes, built again over the block it places them.
class Arena {
 public:
  Arena() = default;
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t n) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(n * int64_t(sizeof(T)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_ = nullptr;
  int64_t used_ = 0;
};

// Large blocks ask for large pages: rows of a product lie a page or more apart, and the addresses of a tile's rows would not fit
// the first level of the TLB.
class Block {
 public:
  static constexpr int64_t kHugePage = 2 << 20;

  explicit Block(int64_t bytes) {
    const int64_t alignment = bytes < kHugePage ? 64 : kHugePage, size = round_up(max64(bytes, 1), alignment);
    data_ = static_cast<char*>(aligned_alloc(size_t(alignment), size_t(size)));
#if defined(MADV_HUGEPAGE)
    if (data_ && bytes >= kHugePage) madvise(data_, size_t(size), MADV_HUGEPAGE);
#endif
  }
  ~Block() { free(data_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
};

VITDIV_INLINE int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Into how many pieces each of `items` is cut so that `threads` share the work evenly: 1 when whole items do.
VITDIV_INLINE int64_t pieces_per_item(int64_t items, int64_t threads, int64_t most) {
  for (int64_t pieces = 1; pieces < most; pieces++) {
    const int64_t tasks = items * pieces;
    // idle share of the last round below an eighth
    if (8 * (ceil_div(tasks, threads) * threads - tasks) <= ceil_div(tasks, threads) * threads) return pieces;
  }
  return max64(most, 1);
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
