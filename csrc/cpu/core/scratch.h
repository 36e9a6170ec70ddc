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

// Hands out pieces of one block, each on cache lines of its own. A structure of scratch pieces takes them in
// its constructor: built once over an empty arena it counts the bytes, built again over the block it places
// them.
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

// Memory for one call. A block is kept for the next call: the kernel clears the pages that it hands out,
// which takes as long as the arithmetic of a small call. Large blocks ask for large pages: rows of a product
// lie a page or more apart, and the addresses of a tile's rows would not fit the first level of the TLB.
class Block {
 public:
  static constexpr int64_t kHugePage = 2 << 20, kMostKept = 32 << 20;

  explicit Block(int64_t bytes) : data_(__atomic_exchange_n(&kept(), nullptr, __ATOMIC_ACQ_REL)) {
    if (data_ && size() >= bytes) return;
    free(data_);
    const int64_t alignment = bytes < kHugePage ? kHeader : kHugePage,
                  all = round_up(bytes + kHeader, alignment);
    data_ = static_cast<char*>(aligned_alloc(size_t(alignment), size_t(all)));
    if (!data_) return;
#if defined(MADV_HUGEPAGE)
    if (bytes >= kHugePage) madvise(data_, size_t(all), MADV_HUGEPAGE);
#endif
    size() = all - kHeader;
  }
  ~Block() {
    if (data_ && size() <= kMostKept) data_ = __atomic_exchange_n(&kept(), data_, __ATOMIC_ACQ_REL);
    free(data_);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  char* data() const { return data_ ? data_ + kHeader : nullptr; }

 private:
  static constexpr int64_t kHeader = 64;  // holds the size, and leaves the rest on cache lines of its own
  static char*& kept() {
    static char* block = nullptr;
    return block;
  }
  int64_t& size() const { return *reinterpret_cast<int64_t*>(data_); }
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
